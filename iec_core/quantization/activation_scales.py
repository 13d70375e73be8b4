"""Calibrated scales of activations: one per layer, or, as in the paper's models, one per layer and timestep.

Shapes in this file: L layers, S timesteps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..advice import TRY_PRECISION
from ..errors import ModelError
from ..profile_file import Profile
from .int8 import quantize_activation
from .packing import CLIPPING, LIMITS


@dataclass
class ActivationScales(Profile):
    """The result of a calibration.

    facts: {str: str}, how it was made. fingerprint: float32 [n], some weights of the model. names: of the L layers that were
    run; the other layers continue to take their scales from their inputs at run time. sigmas: float64 [S], descending, the
    sigmas of the scales. table: float32 [S, L], the scales. One scale for all timesteps is a table of one row.
    """

    KIND, VERSION = "quantization profile", "1"

    facts: dict[str, str]
    fingerprint: torch.Tensor
    names: tuple[str, ...]
    sigmas: torch.Tensor
    table: torch.Tensor
    _moved: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def at(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the scales float32 [L] for sigma, a tensor of one number, on its device. They are interpolated linearly
        between calibrated sigmas. Outside the calibrated range, they are those of the nearest calibrated sigma.
        """
        table, rising = self._rising(sigma.device)
        if len(table) == 1:
            return table[0]
        sigma = sigma.float().reshape(1)
        above = torch.searchsorted(rising, sigma.clamp(rising[0], rising[-1])).clamp(1, len(rising) - 1)
        share = ((sigma - rising[above - 1]) / (rising[above] - rising[above - 1])).clamp(0, 1)
        return torch.lerp(table[above - 1], table[above], share)[0]

    def _rising(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (table float32 [S, L], sigmas float32 [S]) by ascending sigma, on a device. They are kept there, because a
        copy in every evaluation would wait for the device.
        """
        if device not in self._moved:
            self._moved[device] = self.table.flip(0).to(device), self.sigmas.float().flip(0).to(device)
        return self._moved[device]

    def content(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return (tensors, metadata) to be written to a file, as `Profile` requires."""
        tensors = {"fingerprint": self.fingerprint, "sigmas": self.sigmas, "table": self.table}
        return tensors, {"facts": json.dumps(self.facts), "names": json.dumps(self.names)}

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> "ActivationScales":
        names = tuple(json.loads(about["names"]))
        return cls(dict(json.loads(about["facts"])), tensors["fingerprint"], names, tensors["sigmas"], tensors["table"])

    def _is_whole(self) -> bool:
        return (
            "quantization" in self.facts
            and len(self.sigmas) > 0 < len(self.names)
            and all(isinstance(name, str) for name in self.names)
            and self.fingerprint.ndim == self.sigmas.ndim == 1
            and (self.fingerprint.dtype, self.sigmas.dtype) == (torch.float32, torch.float64)
            and self.table.dtype == torch.float32
            and tuple(self.table.shape) == (len(self.sigmas), len(self.names))
            and bool((self.sigmas[1:].float() < self.sigmas[:-1].float()).all())
            and bool((self.table > 0).all() and self.table.isfinite().all() and self.sigmas.isfinite().all())
        )


class ScaleStatistics:
    """Statistics of the inputs of layers in calibration runs.

    First, `largest` records the largest magnitudes. Then, in a repetition of the same runs, `search` sums the squared errors
    for each clipping range in CLIPPING, a fraction of the largest magnitude.

    kinds: {name of a layer: "int8" or "fp8", to which its activations are rounded}. steps: number of steps of a run.
    is_timestep_wise: whether each step has its own scales. step: index of the current step, which the caller sets.
    """

    def __init__(self, kinds: Mapping[str, str], steps: int, is_timestep_wise: bool) -> None:
        self.step = 0
        self._kinds = dict(kinds)
        self._columns = {name: column for column, name in enumerate(kinds)}
        self._is_timestep_wise = is_timestep_wise
        self._largest = torch.zeros(steps if is_timestep_wise else 1, len(kinds))
        self._errors = torch.zeros(len(CLIPPING), *self._largest.shape, dtype=torch.float64)

    def largest(self, name: str, x: torch.Tensor) -> None:
        """Record the largest magnitude of x, float [...], an input of the layer of this name. Raises ModelError if x has
        non-finite values, which the layer's integers would hide.
        """
        place, largest = self._place(name), x.abs().amax().float().cpu()
        if not largest.isfinite():
            raise ModelError(
                f"model: the input of its layer {name} contains NaN or infinity in a calibration run. {TRY_PRECISION}"
            )
        self._largest[place] = torch.maximum(self._largest[place], largest)

    def search(self, name: str, x: torch.Tensor) -> None:
        """Add the squared rounding errors of x, float [...], an input of the layer of this name, for each clipping range. The
        largest magnitudes must be known.
        """
        (row, column), kind, x = self._place(name), self._kinds[name], x.float()
        widest = self._largest[row, column].to(x.device) / LIMITS[kind]
        scales = [(widest * share).clamp(min=torch.finfo(torch.float32).tiny) for share in CLIPPING]
        errors = torch.stack([(_rounded(x, scale, kind) * scale - x).square_().sum() for scale in scales])
        self._errors[:, row, column] += errors.cpu().double()  # moved first: not every device has float64

    def scales(self, searched: bool) -> tuple[tuple[str, ...], torch.Tensor]:
        """Return (names, scales float32 [steps or 1, n]) of the n layers that had a nonzero input.

        A layer has no input at a step that the sampler skips, or at which a cache skips the layer. The layer then has the scale
        of the step before, or, before its first input, that of its first input. searched: whether `search` has chosen the
        clipping ranges; else they are the largest magnitudes.
        """
        limits = torch.tensor([float(LIMITS[kind]) for kind in self._kinds.values()])
        share = torch.tensor(CLIPPING)[self._errors.argmin(0)] if searched else 1.0
        scales = self._largest / limits * share
        for step in range(1, len(scales)):
            scales[step] = torch.where(scales[step] > 0, scales[step], scales[step - 1])
        for step in reversed(range(len(scales) - 1)):
            scales[step] = torch.where(scales[step] > 0, scales[step], scales[step + 1])
        seen = scales[0] > 0
        return tuple(name for name, is_seen in zip(self._kinds, seen.tolist()) if is_seen), scales[:, seen]

    def _place(self, name: str) -> tuple[int, int]:
        return (self.step if self._is_timestep_wise else 0), self._columns[name]


def _rounded(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Return x divided by the scale, rounded to the nearest number of the kind, in float32."""
    if kind == "int8":
        return quantize_activation(x, scale).float()
    return (x / scale).clamp_(-LIMITS[kind], LIMITS[kind]).to(torch.float8_e4m3fn).float()
