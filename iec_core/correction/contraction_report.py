"""The report of a contraction probe: the spectral norms of each step of a run."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from ..run_report import numbered
from .contraction import SpectralNorms

Norms = tuple[SpectralNorms, torch.Tensor]  # from the Jacobian; the same by perturbing the network itself, [P, B]


def _shown(values: Iterable[float]) -> list[float | None]:
    """Return numbers with 6 digits; None for a number that is not finite, which JSON does not have."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


@dataclass
class StepContraction:
    """The norms of one step x' = a x + b eps(x) from sigma to sigma_next. step: its number, from 0.

    growth: ||a I + b J|| of each image, J at x. contraction: {lam: ||(1 - lam) I + lam b J|| of each image}, J at x'.
    true_growth, true_contraction: the same, measured by perturbations of the network itself with its rounding; lower bounds.
    lambda_: the lam of the smallest norm. converged: whether every norm is within the tolerance. products: the number of
    products J v; those with J^T are not counted.
    """

    step: int
    sigma: float
    sigma_next: float
    a: float
    b: float
    growth: list[float | None]
    contraction: dict[str, list[float | None]]
    true_growth: list[float | None]
    true_contraction: dict[str, list[float | None]]
    lambda_: float
    converged: bool
    products: int

    @classmethod
    def of(
        cls,
        step: int,
        sigma: float,
        sigma_next: float,
        a: float,
        b: float,
        lambdas: Sequence[float],
        lambda_: float,
        growth: Norms,
        contraction: Norms,
        products: int,
    ) -> "StepContraction":
        """Return the StepContraction made from these measurements.

        growth: of one pair. contraction: of one pair for each lam.
        """
        names = [f"{value:g}" for value in lambdas]
        tables = [dict(zip(names, map(_shown, table.tolist()))) for table in (contraction[0].norms, contraction[1])]
        converged = all(bool(found.converged.all()) for found, _ in (growth, contraction))
        return cls(
            step, sigma, sigma_next, a, b, _shown(growth[0].norms[0].tolist()), tables[0], _shown(growth[1][0].tolist()),
            tables[1], lambda_, converged, products,
        )  # fmt: skip

    @property
    def least(self) -> float:
        """The norm at lambda_, the largest over the images; NaN where one is not finite."""
        return largest(self.contraction[f"{self.lambda_:g}"])


def largest(values: Iterable[float | None]) -> float:
    """Return the largest of some numbers; NaN where one of them is None or NaN."""
    return max((math.nan if value is None else value for value in values), key=lambda value: (math.isnan(value), value))


def mean(values: Sequence[float | None]) -> float:
    """Return the mean of some numbers; NaN where one of them is None or NaN."""
    return sum(math.nan if value is None else value for value in values) / len(values)


@dataclass
class ContractionReport:
    """The steps that a probe measured in a run.

    quantization: of the model, in words. method: how J v was computed. total: the number of the run's steps.
    """

    quantization: str
    method: str | None = None
    total: int = 0
    steps: list[StepContraction] = field(default_factory=list)

    def finish(self, total: int) -> None:
        """Set the number of the run's steps."""
        self.total = total

    def lambdas(self) -> list[float | None]:
        """Return the suggested lam of every step: its own, or that of the last measured step before it; None without one."""
        measured = {step.step: step.lambda_ for step in self.steps}
        found: list[float | None] = []
        last = None
        for step in range(self.total):
            last = measured.get(step, last)
            found.append(last)
        return found

    def lambdas_text(self) -> str:
        """Return the suggested lam of every step in the form of the samplers' input `lambdas`."""
        return ", ".join(f"{value:g}" for value in self.lambdas())

    def not_converged(self) -> str:
        """Return a sentence that names the steps whose norms did not converge; "" without such steps."""
        steps = [step.step for step in self.steps if not step.converged]
        if not steps:
            return ""
        return (
            f"the norms of {numbered('step', steps)} did not converge to the tolerance and are only lower bounds; use more "
            "iterations."
        )

    def to_json(self) -> str:
        """Return the whole report as JSON text; means and maxima are over the images."""
        steps = []
        for step in self.steps:
            row = asdict(step)
            row["lambda"] = row.pop("lambda_")
            row["growth_mean"], row["growth_max"] = _shown([mean(step.growth), largest(step.growth)])
            for how, summary in (("mean", mean), ("max", largest)):
                row[f"contraction_{how}"] = {name: _shown([summary(norms)])[0] for name, norms in step.contraction.items()}
            steps.append(row)
        about = {"quantization": self.quantization, "jvp": self.method, "total_steps": self.total}
        warnings = [self.not_converged()] if self.not_converged() else []
        return json.dumps({**about, "lambdas": self.lambdas_text(), "warnings": warnings, "steps": steps}, indent=1)
