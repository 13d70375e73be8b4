"""What one sampling run did and cost."""

import itertools
import json
import math
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from .correction.iteration import StepTrace

TRACED = ("lambdas", "residuals", "contraction")  # the lists of a StepTrace, which have one tensor per iteration


@dataclass
class StepReport:
    """One step of a run.

    step: its number, from 0. sigma, sigma_next: the noise levels at its start and end. nfe: evaluations of the denoiser in
    which the network ran. seconds: from the first evaluation of this step to the first of the next. cached: whether a cache
    reuses features in it. reuse_error: how large an error of the prediction that is expected to be, from the noise levels alone
    (`caching.placement.reuse_errors`).

    The other fields are filled for a corrected step, from its `correction.iteration.StepTrace`. lambdas, residuals,
    contraction: one list per iteration with one number per item of the batch, None where it is not finite. fell_back: one bool
    per item.
    """

    step: int
    sigma: float
    sigma_next: float
    corrected: bool
    nfe: int = 0
    seconds: float = 0.0
    cached: bool = False
    reuse_error: float = 0.0
    lambdas: list[list[float | None]] = field(default_factory=list)
    residuals: list[list[float | None]] = field(default_factory=list)
    contraction: list[list[float | None]] = field(default_factory=list)
    fell_back: list[bool] = field(default_factory=list)

    def take(self, trace: StepTrace) -> None:
        """Copy the numbers of a StepTrace into this report. Waits for the device where its tensors are on one."""
        for name in TRACED:
            values = torch.stack(getattr(trace, name)).tolist() if getattr(trace, name) else []
            setattr(self, name, [[_shown(value) for value in row] for row in values])
        self.fell_back = [] if trace.fell_back is None else trace.fell_back.tolist()

    def means(self, name: str) -> list[float | None]:
        """Return, for each iteration, the mean over the images that were still iterated on; None where there were none.

        name: the list of numbers, one of TRACED. An image is done where its contraction is None.
        """
        means: list[float | None] = []
        for row, contraction in zip(getattr(self, name), self.contraction):
            kept = [value for value, still in zip(row, contraction) if still is not None and value is not None]
            means.append(sum(kept) / len(kept) if kept else None)
        return means


def _shown(value: float) -> float | None:
    """Return a float32 number rounded to its 7 significant digits; None where it is not finite, for which JSON has no form."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


@dataclass
class RunReport:
    """The report of one run of n steps, filled by the corrected sampler while it runs.

    label: the name of the run in tables and plots. correction: `CorrectionSettings.summary`. steps: one StepReport per step.
    sigmas: the n + 1 noise levels at the start of each step and the end of the last. nfe: evaluations of the denoiser in which
    the network ran. seconds: the run's time from its first evaluation on (without steps: the time of the sampler function), on
    CUDA by the device's clock. warnings: sentences that the user should read.

    latents: with `keep_latents`, the latent at the start of each step and the final one, n + 1 float32 CPU tensors [B, ...] in
    the coordinates of the network; otherwise None each. result: the output of the run as the host returns it, for a VAE to
    decode.

    source: the node that asked for the correction, "" without one. choice: one sentence with what `auto` chose and why, ""
    without `auto`. moved: the share of the result that the corrections moved, estimated by `correction.bias.moved_in_all`.
    cached_cost: the expected cost of the run's own evaluations with a cache, as a share of their cost without it.
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
    cached_cost: float = 1.0

    def start(self, sigmas: Iterable[float], corrected: Container[int]) -> None:
        """Begin a run over n + 1 sigmas that corrects the steps in `corrected`. The content of an earlier run is dropped."""
        self.sigmas = list(sigmas)
        self.steps = [StepReport(i, *pair, i in corrected) for i, pair in enumerate(itertools.pairwise(self.sigmas))]
        self.nfe, self.seconds, self.moved, self.warnings, self.result = 0, 0.0, 0.0, [], None
        self.cached_cost = 1.0
        self.latents = [None] * len(self.sigmas)

    def note_cache(self, full: Container[int], cost: float, errors: Sequence[float]) -> None:
        """Enter what is expected of a cache: which steps are evaluated in full, the cost of the run, and each step's error."""
        self.cached_cost = float(f"{cost:.3g}")
        for step, error in zip(self.steps, errors):
            step.cached, step.reuse_error = step.step not in full, float(f"{error:.3g}")

    def keep(self, step: int, latent: torch.Tensor) -> None:
        """Keep the latent [B, ...] at the start of `step` (n: the final latent). No effect without `keep_latents`."""
        if self.keep_latents:
            self.latents[step] = latent.detach().to("cpu", torch.float32, copy=True)

    def finish(self, seconds: Sequence[float]) -> None:
        """Enter the seconds of each step, and add a warning that names the steps that fell back."""
        for step, value in zip(self.steps, seconds):
            step.seconds = value
        self.seconds = sum(seconds)
        fallen = [step.step for step in self.steps if any(step.fell_back)]
        if fallen:
            size = max(len(step.fell_back) for step in self.steps)
            numbers = sorted({image for step in self.steps for image, fell in enumerate(step.fell_back) if fell})
            images = "all images" if len(numbers) == size else f"{numbered('image', numbers)} of the batch (numbered from 0)"
            named = numbered("step", fallen)
            self.warnings.append(
                f"{self.label}: the correction of {named} did not converge for {images}, which kept their best iterate; "
                "try a smaller lambda_, another evaluation_point or lambda_mode, or more steps."
            )

    def as_dict(self) -> dict[str, object]:
        """Return the fields that go into JSON: all except sigmas, latents, result, source and `keep_latents`."""
        names = ("label", "correction", "choice", "nfe", "seconds", "moved", "cached_cost", "warnings")
        return {name: getattr(self, name) for name in names} | {"steps": [asdict(step) for step in self.steps]}


def numbered(kind: str, numbers: Sequence[int]) -> str:
    """Return the words for the steps or images with these numbers, such as "step 3" or "steps 3, 4"."""
    return f"{kind}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def to_json(reports: Iterable[RunReport]) -> str:
    """Return a JSON text with the list of the reports."""
    return json.dumps([report.as_dict() for report in reports], indent=1, allow_nan=False)


class TraceReader:
    """Copies the StepTraces of a run from the device into its report while the run goes on, without waiting for the device."""

    def __init__(self, report: RunReport) -> None:
        self._report = report
        # (step, trace, event after the copies of its tensors to the CPU or None without copies), in the order of the steps
        self._pending: list[tuple[int, StepTrace, torch.cuda.Event | None]] = []

    def add(self, step: int, trace: StepTrace) -> None:
        """Begin to copy the trace of a step."""
        if trace.fell_back is None or not trace.fell_back.is_cuda:
            self._pending.append((step, trace, None))
            return
        lists = {name: [_on_its_way(value) for value in getattr(trace, name)] for name in TRACED}
        copy = replace(trace, **lists, fell_back=_on_its_way(trace.fell_back))
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(trace.fell_back.device))
        self._pending.append((step, copy, arrived))

    def take(self, wait: bool = False) -> list[StepReport]:
        """Fill the report with the traces that have arrived, and return their StepReports. wait: wait for all traces first."""
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


def _on_its_way(tensor: torch.Tensor) -> torch.Tensor:
    """Return a pinned CPU tensor, into which a CUDA tensor is copied asynchronously."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _is_here(trace: StepTrace, arrived: torch.cuda.Event | None) -> bool:
    """Tell whether a trace can be read without waiting. On devices other than the CPU and CUDA it never can."""
    if arrived is None:
        return trace.fell_back is None or trace.fell_back.device.type == "cpu"
    return arrived.query()


class Stopwatch:
    """Takes times without waiting for the device. They are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Take the time: on CUDA by the clock of the device, elsewhere by the clock of the host."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between each two consecutive marks. Waits for the device."""
        if not self._is_cuda:
            return [after - before for before, after in itertools.pairwise(self._times)]
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(self._events)]
