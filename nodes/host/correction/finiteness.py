"""Check whether a run stayed finite, and find the cause if it did not."""

import itertools
import math

import torch

from ....iec_core.advice import TRY_PRECISION
from ..sampling.rehearsal import BadSchedule, check_schedule


class Finiteness:
    """Records whether the evaluated latents of a run and their predictions were finite. It is read back once, at the end."""

    def __init__(self):
        self._steps = []
        self._flags = []  # for each evaluation: [latent is finite, prediction is finite]

    def evaluated(self, step, x, denoised):
        """Record an evaluation. step: its number, None if it is not known. x: the latent, None if it is known to be finite."""
        prediction = denoised.isfinite().all()
        self._steps.append(step)
        self._flags.append(torch.stack([torch.ones_like(prediction) if x is None else x.isfinite().all(), prediction]))

    def check(self, samples, name, sigmas, cfg):
        """Raise RuntimeError, with a sentence about the cause, if a latent or prediction was not finite.

        samples: the run's result. name: the sampler's name. sigmas: where the steps begin, and the end of the last step. cfg:
        the guidance scale, None if there is none.
        """
        flags = torch.stack([*self._flags, samples.isfinite().all().expand(2)]).tolist()
        first = next((number for number, both in enumerate(flags) if not all(both)), None)
        if first is None:
            return
        is_prediction = first < len(self._steps) and flags[first][0]
        step = self._steps[first] if first < len(self._steps) else len(sigmas) - 2
        what, advice = _fault(is_prediction, first == 0, step, name, sigmas, cfg)
        raise RuntimeError(f"{what}; no latent is passed on. {advice}")


def _fault(is_prediction, is_first, step, name, sigmas, cfg):
    """Return (what led to NaN or infinity, what to do), two sentences.

    is_prediction: whether the first non-finite value is in a prediction at a finite latent. is_first: whether it is in the
    run's first evaluation.
    """
    where = "" if step is None else f" in step {step} of {len(sigmas) - 1}, numbered from 0 (sigma {sigmas[step]:.4g}),"
    equal = [number for number, (here, then) in enumerate(itertools.pairwise(sigmas)) if here == then]
    try:
        check_schedule(torch.tensor(sigmas))
    except BadSchedule as reason:
        return f"sigmas: {reason}, so {name} produces NaN or infinity, also without IEC", "Choose another schedule."
    if is_prediction and cfg is not None and not math.isfinite(cfg):
        return f"cfg: {cfg} is not a finite number, so no guided prediction is finite", "Choose a number from 0 to 100."
    if is_prediction:
        return f"model:{where} the network returned NaN or infinity", TRY_PRECISION
    if is_first:
        return "latent_image: the latent that sampling starts from contains NaN or infinity", "Connect another latent."
    if equal:
        sigma = f"{sigmas[equal[0]]:.4g}"
        return (
            f"sigmas: step {equal[0]}, numbered from 0, leads from {sigma} to {sigma}, where {name} produces NaN or infinity, "
            "also without IEC",
            "Remove one of the two equal sigmas, or choose another sampler.",
        )
    return (
        f"sampler:{where} {name} itself produced NaN or infinity from finite predictions of the network",
        "Choose another sampler, or another schedule.",
    )
