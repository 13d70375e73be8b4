"""What one sampling run did and cost."""

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass, field, replace

import torch

TRACED = ("lambdas", "residuals", "contraction")  # the lists of a StepTrace, a tensor an iteration


@dataclass
class StepReport:
    """One step of a run. step: from 0. sigma, sigma_next: where it begins and leads. nfe: evaluations of the denoiser.
    seconds: from its first evaluation to the next step's.

    The rest is of a corrected step, one list an iteration with a number for each item of the batch (see
    `correction.StepTrace`); fell_back has one entry an item. What is not a finite number is None.
    """

    step: int
    sigma: float
    sigma_next: float
    corrected: bool
    nfe: int = 0
    seconds: float = 0.0
    lambdas: list[list[float | None]] = field(default_factory=list)
    residuals: list[list[float | None]] = field(default_factory=list)
    contraction: list[list[float | None]] = field(default_factory=list)
    fell_back: list[bool] = field(default_factory=list)

    def take(self, trace):
        """Take over what a StepTrace says; one on a device is waited for."""
        for name in TRACED:
            values = torch.stack(getattr(trace, name)).tolist() if getattr(trace, name) else []
            setattr(self, name, [[_shown(value) for value in row] for row in values])
        self.fell_back = [] if trace.fell_back is None else trace.fell_back.tolist()

    def means(self, name):
        """Return the mean of each iteration's numbers over the images that it was iterated for, None where there is none.

        name: of one of the lists. An image that is done has no contraction.
        """
        means = []
        for row, contraction in zip(getattr(self, name), self.contraction):
            kept = [value for value, still in zip(row, contraction) if still is not None and value is not None]
            means.append(sum(kept) / len(kept) if kept else None)
        return means


def _shown(value):
    """A float32 number with the digits that it has; None where it is not finite, which JSON cannot say."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


@dataclass
class RunReport:
    """Filled by the corrected sampler while it runs.

    label: the run's name in tables and plots. correction: `CorrectionSettings.summary`. choice: what `auto` chose and why, a
    sentence, "" without it. source: the node that asked for the correction, "" where none did. moved: the share of the result
    that the corrections moved, as estimated by `bias.moved_in_all`. steps: a StepReport each.
    sigmas: where the steps begin, and the last one's end, n + 1. nfe: evaluations of the denoiser. seconds: wall time of the
    sampler function. warnings: sentences on what a user should know. latents: with `keep_latents`, the latent at the start of
    every step and the final one, n + 1 float32 CPU tensors [B, ...]. They are in the network's coordinates; `result` is the
    run's output as the host hands it on, which is what a VAE decodes.
    """

    label: str
    correction: str
    keep_latents: bool = False
    steps: list[StepReport] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    nfe: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    latents: list[torch.Tensor | None] = field(default_factory=list)
    result: torch.Tensor | None = None
    source: str = ""
    choice: str = ""
    moved: float = 0.0

    def start(self, sigmas, corrected):
        """Begin a run over `sigmas` (n + 1 floats) that corrects the steps in `corrected`; what an earlier run left is
        dropped.
        """
        self.sigmas = list(sigmas)
        self.steps = [StepReport(i, *pair, i in corrected) for i, pair in enumerate(itertools.pairwise(sigmas))]
        self.nfe, self.seconds, self.moved, self.warnings, self.result = 0, 0.0, 0.0, [], None
        self.latents = [None] * len(self.sigmas)

    def keep(self, step, latent):
        """Keep the latent at the start of `step` (n for the final one), if latents are asked for."""
        if self.keep_latents:
            self.latents[step] = latent.detach().to("cpu", torch.float32, copy=True)

    def finish(self, seconds):
        """Take the seconds of every step, and say which fell back."""
        for step, value in zip(self.steps, seconds):
            step.seconds = value
        self.seconds = sum(seconds)
        fallen = [step.step for step in self.steps if any(step.fell_back)]
        if fallen:
            size = max(len(step.fell_back) for step in self.steps)
            numbers = sorted({image for step in self.steps for image, fell in enumerate(step.fell_back) if fell})
            images = (
                "all images" if len(numbers) == size else f"the images {', '.join(map(str, numbers))} of the batch (from 0)"
            )
            named = f"step {fallen[0]}" if len(fallen) == 1 else f"steps {', '.join(map(str, fallen))}"
            self.warnings.append(
                f"{self.label}: the correction of {named} did not converge for {images}, which kept their best iterate; "
                "try a smaller lambda_, another evaluation_point or lambda_mode, or more steps."
            )

    def as_dict(self):
        """Return the report as JSON has it: all but the latents."""
        names = ("label", "correction", "choice", "nfe", "seconds", "moved", "warnings")
        return {name: getattr(self, name) for name in names} | {"steps": [asdict(step) for step in self.steps]}


def to_json(reports):
    """Return RunReports as JSON text, a list."""
    return json.dumps([report.as_dict() for report in reports], indent=1, allow_nan=False)


class TraceReader:
    """Reads the StepTraces of a run back into its report while it goes on, without waiting for the device."""

    def __init__(self, report):
        self._report = report
        self._pending = []  # (step, trace on the CPU, event that says it has arrived), in order

    def add(self, step, trace):
        """Begin to read the trace of a step."""
        if trace.fell_back is None or not trace.fell_back.is_cuda:
            self._pending.append((step, trace, None))
            return
        lists = {name: [_on_its_way(value) for value in getattr(trace, name)] for name in TRACED}
        copy = replace(trace, **lists, fell_back=_on_its_way(trace.fell_back))
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(trace.fell_back.device))
        self._pending.append((step, copy, arrived))

    def take(self, wait=False):
        """Take what has arrived since into the report, or, with `wait`, all there is; return the StepReports."""
        taken = []
        while self._pending:
            step, trace, arrived = self._pending[0]
            if wait and arrived is not None:
                arrived.synchronize()
            elif not wait and not _is_here(trace, arrived):
                break
            self._pending.pop(0)
            self._report.steps[step].take(trace)
            taken.append(self._report.steps[step])
        return taken


def _on_its_way(tensor):
    """Return a pinned CPU tensor that a CUDA tensor is being copied to."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _is_here(trace, arrived):
    if arrived is None:  # on other devices than CUDA there is no reading without waiting
        return trace.fell_back is None or trace.fell_back.device.type == "cpu"
    return arrived.query()


class Stopwatch:
    """Takes times without waiting for the device; they are read at the end."""

    def __init__(self, device):
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._marks = []

    def mark(self):
        """Take the time, on the device's own clock where it has one."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self):
        """Return the seconds between the marks, waiting for the device."""
        pairs = list(itertools.pairwise(self._marks))
        if not self._is_cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
