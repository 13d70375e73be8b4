"""The experiments: which runs of the built-in models are compared, and for which question.

A row is one way to sample, a `Run`, over images whose classes go round through all that the models know, with the same noise in
every row. What a row is measured against are runs too: its baseline, the run of the same model with no correction; the
full-precision run of as many steps, without cache and correction; and the exact solution. `experiments.py` computes them.

How many images a question needs follows from what it asks: an error is told from another by tens of images in pairs, a distance
between distributions by hundreds.
"""

import itertools
from dataclasses import dataclass, replace

import pack

SCALES = ("small", "full")
FULL_IMAGES = 2048
CHUNK = 8  # images that are sampled at once
EXACT_STEPS = 100  # of heun
STOCHASTIC = ("euler_ancestral", "er_sde")  # their images are no solution of an equation that has an exact one
EVALUATIONS_A_STEP = {"heun": 2}
CONTROLS = (
    "none",
    "shrunk",  # the noise multiplied by what a correction makes of it where noise dominates, without an evaluation
    "epsilon1.005",  # the noise divided by 1.005, by the host's Epsilon Scaling
    "averaged",  # two evaluations at the same point, weights and activations rounded stochastically, averaged
)


@dataclass(frozen=True)
class Run:
    """A way to sample, in the words of the nodes' inputs. quantization: "none" or such as "W8A8". interval: DeepCache's, 1 for
    none. scheduler: "quadratic" for the authors' timesteps. control: one of `CONTROLS`, an effect of a correction by itself.
    """

    architecture: str = "unet"
    quantization: str = "none"
    interval: int = 1
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

    @property
    def key(self):
        """The run in short, another for every other run."""
        words = [self.architecture, self.sampler, self.scheduler, str(self.steps), f"cfg{self.cfg:g}"]
        words += [self.quantization] if self.quantization != "none" else []
        words += [f"cache{self.interval}{self.forecast}"] if self.interval > 1 else []
        if self.correction_steps != "none":
            words += [self.correction_steps, self.evaluation_point]
            words += [f"lambda{self.lambda_:g}"] if self.lambda_ != 0.5 else []
            words += [f"K{self.max_iterations}"] if self.max_iterations != 1 else []
        words += [self.control] if self.control != "none" else []
        return " ".join(words)

    @property
    def baseline(self):
        """The same without a correction or a control."""
        plain = Run()
        correction = ("correction_steps", "evaluation_point", "lambda_", "max_iterations", "control")
        return replace(self, **{name: getattr(plain, name) for name in correction})

    @property
    def same_steps(self):
        """Full precision of as many steps, without a cache or a correction."""
        return replace(self.baseline, quantization="none", interval=1, forecast="hold")

    @property
    def exact(self):
        """The run that stands for the exact solution from the same noise; None where the sampler draws noise of its own."""
        if self.sampler in STOCHASTIC:
            return None
        scheduler = {"unet": "karras", "transformer": "simple"}[self.architecture]
        scheduler = self.scheduler if self.scheduler == "quadratic" else scheduler  # which begins at a sigma of its own
        return replace(self.same_steps, sampler="heun", scheduler=scheduler, steps=EXACT_STEPS)

    @property
    def references(self):
        """The runs that it is measured against, by name; a baseline is not measured against itself."""
        runs = {"baseline": self.baseline, "same_steps": self.same_steps, "exact": self.exact}
        return {name: run for name, run in runs.items() if run is not None and (name, run) != ("baseline", self)}

    @property
    def evaluations(self):
        """About how many whole evaluations of the network an image costs; those of a cache count as its interval's share, and
        guidance counts twice.
        """
        full = range(0, self.steps, self.interval)
        settings = pack.load("iec_core.correction").CorrectionSettings.parse(
            self.correction_steps, self.lambda_, self.max_iterations, evaluation_point=self.evaluation_point
        )
        corrected = settings.steps.of(self.steps, full)
        plain = self.steps * EVALUATIONS_A_STEP.get(self.sampler, 1) * (2 if self.control == "averaged" else 1)
        refreshed = len(corrected.intersection(full)) * settings.added_evaluations
        shallow = (len(corrected) - len(corrected.intersection(full))) * settings.added_evaluations
        share = 1 if self.interval == 1 else 0.1 + 0.9 / self.interval
        return (plain * share + refreshed + 0.1 * shallow) * (1 if self.cfg == 1 else 2)


@dataclass(frozen=True)
class Chunk:
    """The images of a run that are sampled at once: `size` of them, from number * size on."""

    run: Run
    number: int
    size: int


@dataclass(frozen=True)
class Row:
    """A line of a results file: a run over so many images, sampled so many at once."""

    file: str
    run: Run
    images: int
    chunk: int = CHUNK

    @property
    def key(self):
        return self.run.key

    @property
    def baseline(self):
        """The row of the run without a correction."""
        return replace(self, run=self.run.baseline)

    def chunks_of(self, run):
        """Return the chunks that this row needs of one of its runs."""
        return [Chunk(run, number, self.chunk) for number in range(self.images // self.chunk)]

    @property
    def chunks(self):
        """All chunks that the row needs: its own, and those of what it is measured against."""
        return [chunk for run in dict.fromkeys([self.run, *self.run.references.values()]) for chunk in self.chunks_of(run)]


@dataclass(frozen=True)
class Question:
    """What is asked; the name of the file that has its rows; its runs; how many images each of them needs on a CPU."""

    asked: str
    file: str
    runs: list
    images: int = 64


def grid(base, **values):
    """Return the runs that differ from a Run in every combination of the values, each a list by the name of its field."""
    return [replace(base, **dict(zip(values, combination))) for combination in itertools.product(*values.values())]


def with_rules(runs, *rules):
    """Return each run without a correction, and corrected by each rule: (correction_steps, evaluation_point)."""
    return [
        replace(run, correction_steps=steps, evaluation_point=point)
        for run in runs
        for steps, point in (("none", "paper"), *rules)
    ]


ENDS, ALL, ALL_NEXT, ALL_AHEAD = ("ends:1/10", "paper"), ("all", "paper"), ("all", "next"), ("all", "ahead")
FIRST_FIFTH, FIRST_HALF = ("first:4", "next"), ("first:10", "next")
FULL, FULL_NEXT = ("full", "paper"), ("full", "next")
FORMATS = ["none", "W8A8", "W4A8"]
AUTHORS = Run(scheduler="quadratic", sampler="ddim", steps=100, cfg=1.0)
FLOW = Run(architecture="transformer", scheduler="simple")

QUESTIONS = [
    Question(
        "Which rule of correction lowers the error, on which schedule, in which precision; and do more steps do as well?",
        "rules",
        [
            *with_rules(
                grid(Run(), quantization=FORMATS, scheduler=["karras", "simple", "normal"]),
                ENDS, ALL, ALL_NEXT, ALL_AHEAD, FIRST_FIFTH, FIRST_HALF,
            ),
            *grid(Run(), quantization=FORMATS, scheduler=["karras", "simple", "normal"], steps=[24, 30, 40]),
        ],
    ),
    Question(
        "Do the images come nearer to the real ones, and do twice the steps do as well?",
        "distances",
        [
            *with_rules(grid(Run(), quantization=FORMATS), ALL, ALL_NEXT, ALL_AHEAD),
            *grid(Run(), quantization=FORMATS, steps=[40]),
        ],
        images=256,
    ),
    Question(
        "In the authors' cells, 100 steps of DDIM on quadratic timesteps: what helps, and does it help full precision too?",
        "authors",
        [
            *with_rules(grid(AUTHORS, quantization=FORMATS), ALL),
            *with_rules(grid(AUTHORS, interval=[10]), FULL),
            *with_rules(grid(AUTHORS, quantization=["none", "W8A8"]), ALL_NEXT),
            *grid(AUTHORS, quantization=["none", "W8A8"], control=["shrunk", "epsilon1.005"]),
            *grid(AUTHORS, quantization=["W8A8", "W4A8"], control=["averaged"]),
            *grid(AUTHORS, quantization=["none", "W8A8"], steps=[200]),
        ],
        images=256,
    ),
    Question(
        "What does a correction do behind a cache, and do fewer steps without a cache do as well?",
        "caches",
        [
            *with_rules(grid(Run(), interval=[2, 3, 5], forecast=["hold", "linear"]), FULL, FULL_NEXT),
            *grid(Run(), steps=[7, 10, 14]),
        ],
    ),
    Question(
        "What does it do with samplers that keep a history, and with those that draw noise?",
        "samplers",
        with_rules(grid(Run(), sampler=["dpmpp_2m", "euler_ancestral", "er_sde"]), ALL, ALL_NEXT, FIRST_FIFTH),
    ),
    Question(
        "Is it the same on a transformer of flow matching?",
        "transformer",
        [
            *with_rules(grid(FLOW, quantization=FORMATS), ENDS, ALL, ALL_NEXT, ALL_AHEAD, FIRST_FIFTH),
            *with_rules(grid(FLOW, interval=[3], forecast=["hold", "linear"]), FULL, FULL_NEXT),
            *grid(FLOW, steps=[10, 24, 30, 40]),
        ],
    ),
    Question(
        "Which damping, and how many iterations?",
        "damping",
        [
            Run(),
            *grid(Run(correction_steps="all"), evaluation_point=["paper", "next"], lambda_=[0.1, 0.3, 0.5, 0.7, 0.9, 1.0]),
            *grid(Run(correction_steps="all"), evaluation_point=["paper", "next"], max_iterations=[2, 3]),
        ],
    ),
]  # fmt: skip


def declared(scale="small", chunk=CHUNK):
    """Return {file name without suffix: [Row, ...]} of all questions; a file has all rows of its question, each once.

    scale: "small", as many images as each question needs, or "full", `FULL_IMAGES` a row. chunk: images sampled at once.
    """
    images = {question.file: question.images if scale == "small" else FULL_IMAGES for question in QUESTIONS}
    return {
        question.file: [Row(question.file, run, images[question.file], chunk) for run in dict.fromkeys(question.runs)]
        for question in QUESTIONS
    }
