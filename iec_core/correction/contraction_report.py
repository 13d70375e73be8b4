"""What a contraction probe found out about the steps of a run."""

import json
import math
from dataclasses import asdict, dataclass, field


def _shown(values):
    """Numbers with the digits that they have; None where one is not finite, which JSON cannot say."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


@dataclass
class StepContraction:
    """One step. step: from 0. sigma, sigma_next: where it begins and leads. a, b: of x' = a x + b eps(x).

    growth: ||a I + b J|| of each image, J at x. contraction: {lam: ||(1 - lam) I + lam b J|| of each image}, J at x'. The same
    with `true_`: what the network itself, roundings and all, shows by perturbations; from below. lambda_: the lam of least
    norm. converged: whether every norm is within the tolerance. products: how many J v and J^T w, each, it took.
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
    def of(cls, step, sigma, sigma_next, a, b, lambdas, lambda_, growth, contraction, products):
        """growth, contraction: (SpectralNorms, what the network itself shows [P, B]) of one pair, and of one for each lam."""
        names = [f"{value:g}" for value in lambdas]
        tables = [dict(zip(names, map(_shown, table.tolist()))) for table in (contraction[0].norms, contraction[1])]
        converged = all(bool(found.converged.all()) for found, _ in (growth, contraction))
        return cls(
            step, sigma, sigma_next, a, b, _shown(growth[0].norms[0].tolist()), tables[0], _shown(growth[1][0].tolist()),
            tables[1], lambda_, converged, products,
        )  # fmt: skip

    @property
    def least(self):
        """The norm at lambda_, the largest over the images."""
        return largest(self.contraction[f"{self.lambda_:g}"])


def largest(values):
    """Return the largest of a list of numbers, nan where there is one that is none."""
    return max((math.nan if value is None else value for value in values), key=lambda value: (math.isnan(value), value))


def mean(values):
    """Return the mean of a list of numbers, nan where there is one that is none."""
    return sum(math.nan if value is None else value for value in values) / len(values)


@dataclass
class ContractionReport:
    """quantization: of the model, in words. method: how J v was computed. total: the run's steps. steps: those measured."""

    quantization: str
    method: str | None = None
    total: int = 0
    steps: list[StepContraction] = field(default_factory=list)

    def finish(self, total):
        """Take the number of the run's steps."""
        self.total = total

    def lambdas(self):
        """Return the suggested lam of every step; of one that was not measured, that of the last measured before it."""
        measured = {step.step: step.lambda_ for step in self.steps}
        found, last = [], None
        for step in range(self.total):
            last = measured.get(step, last)
            found.append(last)
        return found

    def lambdas_text(self):
        """Return the suggested lam of every step as the samplers' `lambdas` take them."""
        return ", ".join(f"{value:g}" for value in self.lambdas())

    def not_converged(self):
        """Return the sentence on the steps whose norms are not known to the tolerance, "" where there are none."""
        steps = [str(step.step) for step in self.steps if not step.converged]
        if not steps:
            return ""
        named = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(steps)}"
        return f"the norms of {named} are bounds from below, not known to the tolerance; allow more iterations."

    def to_json(self):
        """Return all that was found out as JSON text; mean and largest are over the images."""
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
