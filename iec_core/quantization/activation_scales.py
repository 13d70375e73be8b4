"""Calibrated scales of activations: one for each layer, or, as in the paper's models, one for each layer and timestep."""

import json
from dataclasses import dataclass, field

import torch

from ..advice import TRY_PRECISION
from ..profile_file import Profile
from .int8 import quantize_activation
from .packing import CLIPPING, LIMITS


@dataclass
class ActivationScales(Profile):
    """What a calibration has found out.

    facts: {str: str}, of how it was made. fingerprint: float32 [n], weights of the model. names: of the L layers that were run;
    others go on with scales of what comes in. sigmas: float64 [S], descending, where the scales are of. table: float32 [S, L].
    One scale for all timesteps is a table of one row.
    """

    KIND, VERSION = "quantization profile", "1"

    facts: dict[str, str]
    fingerprint: torch.Tensor
    names: tuple[str, ...]
    sigmas: torch.Tensor
    table: torch.Tensor
    _moved: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, sigma):
        """Return the scales float32 [L] for sigma (a tensor of one number), on its device: between two calibrated sigmas on the
        line, outside them those of the nearest.
        """
        table, rising = self._rising(sigma.device)
        if len(table) == 1:
            return table[0]
        sigma = sigma.float().reshape(1)
        above = torch.searchsorted(rising, sigma.clamp(rising[0], rising[-1])).clamp(1, len(rising) - 1)
        share = ((sigma - rising[above - 1]) / (rising[above] - rising[above - 1])).clamp(0, 1)
        return torch.lerp(table[above - 1], table[above], share)[0]

    def _rising(self, device):
        """Return (table, sigmas float32 [S]) by rising sigma, on a device. They stay there: to move them in every evaluation
        would wait for the device.
        """
        if device not in self._moved:
            self._moved[device] = self.table.flip(0).to(device), self.sigmas.float().flip(0).to(device)
        return self._moved[device]

    def content(self):
        """Return what `Profile` wants to know."""
        tensors = {"fingerprint": self.fingerprint, "sigmas": self.sigmas, "table": self.table}
        return tensors, {"facts": json.dumps(self.facts), "names": json.dumps(self.names)}

    @classmethod
    def _of(cls, tensors, about):
        names = tuple(json.loads(about["names"]))
        return cls(dict(json.loads(about["facts"])), tensors["fingerprint"], names, tensors["sigmas"], tensors["table"])

    def _is_whole(self):
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
    """What passes through the layers in calibration runs. step: where the run is now, from 0.

    First `largest` takes up the largest magnitudes. `search`, in further runs of the same, sums the squared errors for every
    share of these as clipping range. kinds: {name of a layer: what its activations are rounded to, "int8" or "fp8"}.
    """

    def __init__(self, kinds, steps, is_timestep_wise):
        self.step = 0
        self._kinds = dict(kinds)
        self._columns = {name: column for column, name in enumerate(kinds)}
        self._is_timestep_wise = is_timestep_wise
        self._largest = torch.zeros(steps if is_timestep_wise else 1, len(kinds))
        self._errors = torch.zeros(len(CLIPPING), *self._largest.shape, dtype=torch.float64)

    def largest(self, name, x):
        """Take up what enters the layer of this name, x float [...]. Raises ValueError where that is not finite, which the
        layer's integers would hide.
        """
        place, largest = self._place(name), x.abs().amax().float().cpu()
        if not largest.isfinite():
            raise ValueError(
                f"model: NaN or infinity came into its layer {name} in a calibration run, from which nothing can be found out. "
                f"{TRY_PRECISION}"
            )
        self._largest[place] = torch.maximum(self._largest[place], largest)

    def search(self, name, x):
        """Take up what enters the layer of this name, once its largest magnitude is known."""
        (row, column), kind, x = self._place(name), self._kinds[name], x.float()
        widest = self._largest[row, column].to(x.device) / LIMITS[kind]
        scales = [(widest * share).clamp(min=torch.finfo(torch.float32).tiny) for share in CLIPPING]
        errors = torch.stack([(_rounded(x, scale, kind) * scale - x).square_().sum() for scale in scales])
        self._errors[:, row, column] += errors.cpu().double()  # in this order: not every device has float64

    def scales(self, searched):
        """Return (names, scales float32 [steps or 1, n]) of the n layers that were run with anything but zeros.

        A step at which one of them was not, because the sampler left the step out or a cache the layer, has the scale of the
        step before, or of the first that there is.
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

    def _place(self, name):
        return (self.step if self._is_timestep_wise else 0), self._columns[name]


def _rounded(x, scale, kind):
    """Return x over the scale, rounded to what the kind of activation can be, in float32."""
    if kind == "int8":
        return quantize_activation(x, scale).float()
    return (x / scale).clamp_(-LIMITS[kind], LIMITS[kind]).to(torch.float8_e4m3fn).float()
