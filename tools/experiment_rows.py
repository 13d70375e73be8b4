"""The experiments: which runs of the built-in models are compared, and for which question.

A row is one way to sample, a `Run`, over images whose classes cycle through all classes of the model, with the same noise in
every row. A row is measured against other runs: its baseline, the run of the same model without correction; the full-precision
run of as many steps, without cache and correction; and the exact solution. `experiments.py` computes the rows.

The number of images depends on the question: tens of images, compared in pairs, are enough to distinguish two errors; a
distance between distributions needs hundreds.
"""

import itertools
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pack

SCALES = ("small", "full")
FULL_IMAGES = 2048
CHUNK = 8  # images that are sampled at once
EXACT_STEPS = 100  # of heun
STOCHASTIC = ("euler_ancestral",)  # its images do not approximate the exact solution of an equation
EVALUATIONS_A_STEP = {"heun": 2}
CACHES = ("deepcache", "calibrated")
CALIBRATION_RUNS, CALIBRATION_IMAGES = 8, 2  # images per run, one for each class of a prompt
EXACT_SCHEDULER = {"unet": "karras", "transformer": "simple"}
# The U-Net's weights: the built-in ones, or these trained further with or without a penalty (train_smooth.py).
WEIGHTS = ("built-in", "longer", "smooth")
SPLIT = 3  # heun steps per step, where a step must be exact
# A single effect, and by about which factor it multiplies the evaluations of the network.
CONTROLS = {
    "none": 1,
    "shrunk": 1,  # the noise times the factor by which a correction shrinks it where noise dominates, without an evaluation
    "epsilon1.005": 1,  # the noise divided by 1.005, by the host's Epsilon Scaling
    "averaged": 2,  # the mean of two evaluations at the same point, with stochastically rounded weights and activations
    "last step alone": 2 * SPLIT,  # all steps but the last are split: only its error is left, which `ahead` never corrects
}


@dataclass(frozen=True)
class Run:
    """A way to sample, in the terms of the nodes' inputs.

    quantization: "none" or, for example, "W8A8". interval: the cache's, 1 for no cache. cache: one of `CACHES`; "calibrated" is
    CacheQuant on the steps that its calibration finds. scheduler: "quadratic" is the authors' timesteps. control: one of
    `CONTROLS`. instead_of: the number of steps of the run that it is compared with, 0 for the same number. Raises ValueError
    for another cache or control, for a cache without an interval, and for the control "last step alone" on anything but a plain
    run of euler.
    """

    weights: ClassVar[str] = "built-in"
    architecture: str = "unet"
    quantization: str = "none"
    interval: int = 1
    cache: str = "deepcache"
    forecast: str = "hold"
    sampler: str = "euler"
    scheduler: str = "karras"
    steps: int = 20
    cfg: float = 3.0
    correction_steps: str = "none"
    evaluation_point: str = "paper"
    lambda_: float = 0.5
    max_iterations: int = 1
    control: str = "none"
    instead_of: int = 0

    def __post_init__(self):
        for name, known in (("control", CONTROLS), ("cache", CACHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: '{getattr(self, name)}' is none; name one of {', '.join(known)}.")
        if self.interval == 1 and (self.cache, self.forecast) != (Run.cache, Run.forecast):
            raise ValueError("interval: at 1 there is no cache; leave cache and forecast out.")
        is_plain = self.correction_steps == "none" and self.interval == 1 and self.sampler == "euler"
        if self.control == "last step alone" and (not is_plain or self.scheduler == "quadratic"):
            raise ValueError(
                "control: 'last step alone' works only with euler on a schedule of the host, without cache and correction."
            )

    @property
    def key(self):
        """A short text that is unique to the run."""
        words = [self.architecture, self.sampler, self.scheduler, str(self.steps), f"cfg{self.cfg:g}"]
        words += [self.quantization] if self.quantization != "none" else []
        kind = "cache" if self.cache == "deepcache" else self.cache
        words += [f"{kind}{self.interval}{self.forecast}"] if self.interval > 1 else []
        if self.correction_steps != "none":
            words += [self.correction_steps, self.evaluation_point]
            words += [f"lambda{self.lambda_:g}"] if self.lambda_ != 0.5 else []
            words += [f"K{self.max_iterations}"] if self.max_iterations != 1 else []
        words += [self.control] if self.control != "none" else []
        words += [f"instead of {self.instead_of}"] if self.instead_of else []
        return " ".join(words)

    @property
    def sampled(self):
        """The run that is sampled: without `instead_of`, which does not change the images."""
        return replace(self, instead_of=0)

    @property
    def uncorrected(self):
        """The same run without correction or control."""
        plain = Run()
        correction = ("correction_steps", "evaluation_point", "lambda_", "max_iterations", "control")
        return replace(self, instead_of=0, **{name: getattr(plain, name) for name in correction})

    @property
    def baseline(self):
        """The run that it is compared with: without correction or control, with `instead_of` steps if that is not 0."""
        return replace(self.uncorrected, steps=self.instead_of or self.steps)

    @property
    def same_steps(self):
        """The full-precision run of as many steps, without cache or correction."""
        return replace(self.uncorrected, quantization="none", interval=1, cache="deepcache", forecast="hold")

    @property
    def exact(self):
        """The reference run that approximates the exact solution from the same noise; None if the sampler adds noise."""
        if self.sampler in STOCHASTIC:
            return None
        scheduler, steps = EXACT_SCHEDULER[self.architecture], EXACT_STEPS
        if self.scheduler == "quadratic":  # it begins at its own sigma, and 100 of its steps with `next` are heun itself
            scheduler, steps = self.scheduler, 2 * EXACT_STEPS
        return replace(self.same_steps, sampler="heun", scheduler=scheduler, steps=steps)

    @property
    def references(self):
        """The runs that it is measured against, by name; a baseline is not measured against itself."""
        runs = {"baseline": self.baseline, "same_steps": self.same_steps, "exact": self.exact}
        return {name: run for name, run in runs.items() if run is not None and (name, run) != ("baseline", self)}

    @property
    def model(self):
        """A key of the run's MODEL; for a calibrated cache it includes sampler, schedule, steps and guidance."""
        parts = (self.architecture, self.quantization, self.interval, self.cache, self.forecast)
        return parts + ((self.sampler, self.scheduler, self.steps, self.cfg) if self.cache == "calibrated" else ())

    @property
    def calibration(self):
        """The number of network evaluations per image that calibrate its MODEL."""
        if self.cache != "calibrated":
            return 0
        return CALIBRATION_RUNS * CALIBRATION_IMAGES * self.steps * (1 if self.cfg == 1 else 2)

    @property
    def evaluations(self):
        """The approximate number of full network evaluations per image. An evaluation with a cache counts as a share that
        depends on the interval, and guidance counts twice.
        """
        full = range(0, self.steps, self.interval)
        settings = pack.load("iec_core.correction.iteration").CorrectionSettings.parse(
            self.correction_steps, self.lambda_, self.max_iterations, evaluation_point=self.evaluation_point
        )
        corrected = settings.steps.of(self.steps, full)
        plain = self.steps * EVALUATIONS_A_STEP.get(self.sampler, 1) * CONTROLS[self.control]
        refreshed = len(corrected.intersection(full)) * settings.added_evaluations
        shallow = (len(corrected) - len(corrected.intersection(full))) * settings.added_evaluations
        share = 1 if self.interval == 1 else 0.1 + 0.9 / self.interval
        return (plain * share + refreshed + 0.1 * shallow) * (1 if self.cfg == 1 else 2)


@dataclass(frozen=True)
class TunedRun(Run):
    """A Run of the U-Net with one of `WEIGHTS`, named in its row. Raises ValueError for other weights or another model."""

    weights: str = Run.weights

    def __post_init__(self):
        super().__post_init__()
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights: '{self.weights}' is none; name one of {', '.join(WEIGHTS)}.")
        if self.architecture != "unet":
            raise ValueError(f"architecture: '{self.architecture}' has the built-in weights alone; unet has others.")

    @property
    def key(self):
        return f"{super().key} {self.weights} weights"

    @property
    def sampled(self):
        """With the built-in weights this is the plain Run, whose images are already sampled."""
        if self.weights != Run.weights:
            return super().sampled
        return Run(**{one.name: getattr(self, one.name) for one in fields(Run)}).sampled

    @property
    def model(self):
        return *super().model, self.weights


@dataclass(frozen=True)
class Chunk:
    """The images of a run that are sampled at once: `size` images, starting at image number * size."""

    run: Run
    number: int
    size: int


@dataclass(frozen=True)
class Row:
    """A line of a results file: a run, its number of images, and the number of images per chunk."""

    file: str
    run: Run
    images: int
    chunk: int = CHUNK

    @property
    def key(self):
        return self.run.key

    @property
    def baseline(self):
        """The row of the run that this one is compared with."""
        return replace(self, run=self.run.baseline)

    def chunks_of(self, run):
        """Return the chunks that this row needs of one of its runs."""
        return [Chunk(run.sampled, number, self.chunk) for number in range(self.images // self.chunk)]

    @property
    def chunks(self):
        """All chunks that the row needs: its own, and those of its references."""
        return [chunk for run in dict.fromkeys([self.run, *self.run.references.values()]) for chunk in self.chunks_of(run)]


@dataclass(frozen=True)
class Question:
    """A question: its text; the name of the file of its rows; its runs; the number of images that each run needs on a CPU."""

    asked: str
    file: str
    runs: list
    images: int


def grid(base, **values):
    """Return the runs that differ from a Run in every combination of the values; values: {name of a field: list}."""
    return [replace(base, **dict(zip(values, combination))) for combination in itertools.product(*values.values())]


def with_rules(runs, *rules):
    """Return each run without a correction, and corrected by each rule: (correction_steps, evaluation_point)."""
    return [
        replace(run, correction_steps=steps, evaluation_point=point)
        for run in runs
        for steps, point in (("none", "paper"), *rules)
    ]


def with_more_steps(runs, *counts):
    """Return each run with more steps, to be compared with the original run."""
    return [replace(run, steps=steps, instead_of=run.steps) for run in runs for steps in counts]


AUTO = ("auto", "ahead")
ENDS, FIRST_HALF, ALL = [(steps, "paper") for steps in ("ends:1/10", "first:10", "all")]
ENDS_NEXT, FIRST_FIFTH_NEXT, FIRST_HALF_NEXT, ALL_NEXT = [
    (steps, "next") for steps in ("ends:1/10", "first:4", "first:10", "all")
]
FIRST_HALF_AHEAD, ALL_AHEAD = [(steps, "ahead") for steps in ("first:10", "all")]
RULES = (
    AUTO, ENDS, FIRST_HALF, ALL, ENDS_NEXT, FIRST_FIFTH_NEXT, FIRST_HALF_NEXT, ALL_NEXT, FIRST_HALF_AHEAD, ALL_AHEAD,
)  # fmt: skip
FULL, FULL_NEXT, FULL_AHEAD = [("full", point) for point in ("paper", "next", "ahead")]
FORMATS = ["none", "W8A8", "W4A8"]
UNET, FLOW = Run(), Run(architecture="transformer", scheduler="simple")
AUTHORS = Run(scheduler="quadratic", sampler="ddim", steps=100, cfg=1.0)
SCHEDULES = ["karras", "simple", "sgm_uniform", "exponential", "beta", "normal", "linear_quadratic", "kl_optimal"]


def choices(base):
    """Return the runs among which a user of a model chooses at full precision: steps, samplers, caches, corrections."""
    few, cached = [7, 10, 14, 20, 30], {"steps": [20, 30], "interval": [2, 3]}
    calibrated = {**cached, "cache": ["calibrated"], "forecast": ["linear"]}
    return [
        *with_rules(grid(base, steps=few), AUTO),
        *grid(base, sampler=["dpmpp_2m", "uni_pc"], steps=few),
        *grid(base, sampler=["heun"], steps=[5, 7, 10, 15]),
        *with_rules(grid(base, forecast=["auto"], **cached), AUTO),
        *grid(base, sampler=["dpmpp_2m"], forecast=["auto"], **cached),
        *with_rules(grid(base, **calibrated), AUTO),
        *grid(base, sampler=["dpmpp_2m"], **calibrated),
    ]


QUESTIONS = [
    Question(
        "With the authors' settings, 100 steps of DDIM on quadratic timesteps: what helps, and does it help full precision?",
        "authors",
        [
            *with_rules(grid(AUTHORS, quantization=FORMATS), ALL),
            *with_rules(grid(AUTHORS, interval=[10]), FULL),
            *with_rules(grid(AUTHORS, quantization=["none", "W8A8"]), ALL_NEXT),
            *grid(AUTHORS, quantization=["none", "W8A8"], control=["shrunk", "epsilon1.005"]),
            *grid(AUTHORS, quantization=["W8A8"], control=["averaged"]),
            *with_more_steps(grid(AUTHORS, quantization=["none", "W8A8"]), 200),
        ],
        images=256,
    ),
    Question(
        "In 20 steps, does a correction bring the images nearer to the real ones? And is it as good to take twice the steps?",
        "distances",
        [
            *with_rules(grid(UNET, quantization=["none", "W8A8"]), ALL, ALL_NEXT, ALL_AHEAD),
            *with_rules(grid(UNET, quantization=["W4A8"]), ALL, ALL_AHEAD),
            *with_more_steps(grid(UNET, quantization=["none", "W8A8"]), 40),
            UNET.exact,  # shows how near the reference itself is; its images are sampled anyway
        ],
        images=256,
    ),
    Question(
        "Which steps should be corrected, and where? And is it as good to spend the same evaluations on more steps?",
        "rules",
        [
            *with_rules(grid(UNET, quantization=FORMATS, scheduler=["karras", "simple"]), *RULES),
            *with_rules(grid(FLOW, quantization=FORMATS), *RULES),
            *with_more_steps(grid(UNET, quantization=FORMATS, scheduler=["karras", "simple"]), 30, 40),
            *with_more_steps(grid(FLOW, quantization=FORMATS), 30, 40),
        ],
        images=32,
    ),
    Question(
        "With how many steps does it help?",
        "steps",
        [
            *with_rules(grid(UNET, quantization=["none", "W8A8"], steps=[10, 50]), AUTO, ENDS, ALL, ALL_NEXT),
            *with_rules(grid(FLOW, quantization=["none", "W8A8"], steps=[10, 50]), AUTO, ENDS, ALL, ALL_NEXT),
        ],
        images=32,
    ),
    Question(
        "On which schedules?",
        "schedules",
        with_rules(grid(UNET, scheduler=SCHEDULES, steps=[4, 6, 10, 20, 50]), ALL_AHEAD),
        images=16,
    ),
    Question(
        "Does `auto` harm in any cell of model, bits, cache, schedule and steps?",
        "cells",
        [
            run
            for base, schedules in ((UNET, ["simple", "karras", "normal"]), (FLOW, ["simple", "normal", "beta"]))
            for kind in (grid(base, quantization=FORMATS), grid(base, interval=[3, 5], forecast=["auto"]))
            for plain in kind
            for run in with_rules(grid(plain, scheduler=schedules, steps=[10, 20, 30]), AUTO)
        ],
        images=32,
    ),
    Question(
        "What limits the gain of `auto`? How much of the error comes from the last step, which is never corrected?",
        "limits",
        [
            run
            for base in (
                *grid(UNET, scheduler=["karras", "linear_quadratic", "kl_optimal"], steps=[10, 20, 50]),
                *grid(FLOW, steps=[10, 20, 50]),
            )
            for run in (*with_rules([base], AUTO), replace(base, control="last step alone"))
        ]
        + [replace(run, sampler="heun", steps=10) for run in (replace(UNET, scheduler="kl_optimal"), FLOW)],
        images=16,
    ),
    Question(
        "With which samplers, of higher order or with a history?",
        "samplers",
        [
            *with_rules(grid(UNET, sampler=["dpmpp_2m", "uni_pc", "heun"]), AUTO, ENDS, ALL, ALL_NEXT),
            *with_rules(grid(UNET, sampler=["dpmpp_2m"], quantization=["W8A8"]), AUTO, ENDS, ALL, ALL_NEXT),
            *with_rules(grid(UNET, sampler=["dpmpp_2m"], scheduler=["normal"]), AUTO, ENDS, ALL, ALL_NEXT),
            *with_rules(grid(FLOW, sampler=["dpmpp_2m", "uni_pc", "heun"]), AUTO, ENDS, ALL, ALL_NEXT),
        ],
        images=32,
    ),
    Question(
        "With a sampler that draws noise, does a correction bring the images nearer to the real ones? And is it as good to "
        "take twice the steps?",
        "noise",
        [
            *with_rules(grid(UNET, sampler=["euler_ancestral"]), AUTO, ALL, ALL_NEXT),
            *with_more_steps(grid(UNET, sampler=["euler_ancestral"]), 40),
        ],
        images=256,
    ),
    Question(
        "Does a correction help behind a cache? And do fewer steps without a cache do as well?",
        "caches",
        [
            *with_rules(
                grid(UNET, interval=[2, 3, 5], forecast=["hold", "linear", "auto"]),
                AUTO, FULL, FULL_NEXT, FULL_AHEAD, ALL_AHEAD,
            ),
            *with_rules(grid(FLOW, interval=[2, 3, 5], forecast=["hold", "auto"]), AUTO, FULL_NEXT),
            *with_rules(grid(UNET, cache=["calibrated"], interval=[2, 3, 5], forecast=["hold", "linear"]), AUTO),
            *with_rules(grid(FLOW, cache=["calibrated"], interval=[2, 3, 5], forecast=["hold", "linear"]), AUTO),
            *with_rules(grid(UNET, steps=[7, 10, 14, 20]), AUTO),
            *with_rules(grid(FLOW, steps=[7, 10, 14, 20]), AUTO),
        ],
        images=32,
    ),
    Question(
        "Which damping, and how many iterations?",
        "damping",
        [
            *with_rules(grid(UNET, quantization=["none", "W8A8"]), ALL, ALL_NEXT),
            *grid(
                replace(UNET, correction_steps="all"), quantization=["none", "W8A8"], evaluation_point=["paper", "next"],
                lambda_=[0.1, 0.3, 0.7, 0.9, 1.0],
            ),
            *grid(
                replace(UNET, correction_steps="all"), quantization=["none", "W8A8"], evaluation_point=["paper", "next"],
                max_iterations=[2, 3],
            ),
        ],
        images=32,
    ),
    Question(
        "Does a network with a smaller Jacobian need less correction?",
        "smoothness",
        with_rules(grid(TunedRun(), weights=list(WEIGHTS), quantization=FORMATS), ALL, ALL_NEXT, ALL_AHEAD),
        images=32,
    ),
    Question(
        "What should one take, for the least error in a given time?",
        "choices",
        [*choices(UNET), *choices(FLOW)],
        images=32,
    ),
]  # fmt: skip


def declared(scale="small", chunk=CHUNK):
    """Return {file name without suffix: [Row, ...]} of all questions; a file has each row of its question once.

    scale: "small", as many images as each question needs, or "full", `FULL_IMAGES` images per row. chunk: images sampled at
    once.
    """
    images = {question.file: question.images if scale == "small" else FULL_IMAGES for question in QUESTIONS}
    return {
        question.file: [Row(question.file, run, images[question.file], chunk) for run in dict.fromkeys(question.runs)]
        for question in QUESTIONS
    }
