"""CacheQuant (arXiv 2503.01323): which steps to evaluate in full, and how to correct the features that the other steps reuse.

Both are learned from calibration runs. F_s is the feature of step s, and F_start that of the first step of its group.

DPS, the schedule: the steps are split into contiguous groups, and each group reuses the feature of its first step. There are as
many groups as with a uniform interval N, and each is between ceil(N / 2) and 2 N steps long; a run of fewer than
ceil(N / 2) steps is one group. Of all these splits, dynamic programming finds the one with the least sum of |F_s - F_start|.

DEC, the correction: the reused feature F_start is mapped to F_s by an affine map a F + b per channel, the least-squares fit
a = cov / var over all prompts, positions and conditioning entries. With a quantized model, F_start comes from the quantized
network and F_s from the full-precision one, so that the map corrects the errors of both; a second map then corrects the output
of the block that consumes the feature. Beyond the paper, the map may combine the features of the last two full steps, which is
a forecast with fitted weights.
"""

import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..advice import TRY_PRECISION
from ..devices import has_float64
from ..errors import ModelError, ProfileError, SettingsError
from ..profile_file import Profile
from .feature_cache import FeatureCache, Kept, Slot
from .placement import least_cost_groups

COLUMNS = 65536  # how many numbers per channel are summed at a time in float64, to bound the memory
FACTS = {"network", "branch", "interval", "quantization", "sampler_name", "scheduler"}  # the facts that each profile must have


def group_steps(cost: Sequence[Sequence[float]] | np.ndarray, interval: int, shortest: int | None = None) -> list[int]:
    """Return the first steps of the groups with the least total cost, in ascending order. The minimum is exact.

    cost: a square table over the steps; cost[i][s], for i < s, is the cost if step s reuses the feature of step i. There are
    ceil(steps / interval) groups, each between `shortest` and 2 * interval steps long; a run of fewer steps is one group.
    shortest: None for the paper's ceil(interval / 2). Raises ModelError if the costs are not finite.
    """
    shortest = math.ceil(interval / 2) if shortest is None else shortest
    total, count = len(cost), math.ceil(len(cost) / interval)
    longest = min(2 * interval, total)
    costs = np.full((total, longest), math.inf)
    for lag in range(longest):
        costs[: total - lag, lag] = np.diagonal(np.asarray(cost, dtype=np.float64), lag)
    costs[:, 0] = 0
    firsts = least_cost_groups(costs, count, min(shortest, total // count))
    if firsts is None:  # not with finite costs: the mean length is between the shortest and the longest
        raise ModelError(f"model: its features overflow in a calibration run. {TRY_PRECISION}")
    return firsts


def _in_float64(x: torch.Tensor) -> torch.Tensor:
    return (x if has_float64(x.device) else x.cpu()).double()


class ChannelFit:
    """The least-squares map from tensors x_1 .. x_k to a tensor y, per channel: y = a_1 x_1 + .. + a_k x_k + b. In float64."""

    def __init__(self, channel_dim: int) -> None:
        self._channel_dim = channel_dim
        self._count = 0  # observations per channel
        self._sums = torch.zeros((), dtype=torch.float64)  # [C, k + 1] after the first `add`
        self._products = torch.zeros((), dtype=torch.float64)  # [C, k + 1, k + 1] after the first `add`

    def add(self, xs: Sequence[torch.Tensor], y: torch.Tensor) -> None:
        """Add observations: k tensors and y, all of one shape."""
        values = [value.movedim(self._channel_dim, 0).flatten(1) for value in (*xs, y)]
        for parts in zip(*(value.split(COLUMNS, dim=1) for value in values)):
            stacked = torch.stack([_in_float64(part) for part in parts], dim=1)  # [C, k + 1, n]
            self._count += stacked.shape[2]
            self._sums = self._sums + stacked.sum(2).cpu()
            self._products = self._products + (stacked @ stacked.mT).cpu()

    def solve(self) -> torch.Tensor:
        """Return the least-squares a_1 .. a_k and b, float64 [C, k + 1].

        If several are equally good, the one with a nearest to (1, 0, .., 0) is returned: where the x are constant, the map is
        x_1 + b.
        """
        mean = self._sums / self._count
        covariance = self._products / self._count - mean[:, :, None] * mean[:, None, :]
        among, with_y = covariance[:, :-1, :-1], covariance[:, :-1, -1]
        change = (torch.linalg.pinv(among, rtol=1e-9, hermitian=True) @ (with_y - among[:, :, 0])[:, :, None])[:, :, 0]
        change[:, 0] += 1  # the pseudoinverse has fitted y - x_1, with the smallest weights
        return torch.cat([change, mean[:, -1:] - (change * mean[:, :-1]).sum(1, keepdim=True)], dim=1)


class _AllSteps:
    """Base class of the collectors that a calibration run has instead of a FeatureCache. Every step is evaluated in full.

    sigmas: float64 [steps + 1] of the run; empty before `full_steps` was called.
    """

    def __init__(self) -> None:
        self.sigmas = torch.zeros(0, dtype=torch.float64)
        self._visited: set[int] = set()

    def full_steps(self, sigmas: Sequence[float]) -> frozenset[int]:
        """Return all steps of a run with these sigmas."""
        self.sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        return frozenset(range(len(sigmas) - 1))

    def _own_step(self, position: float) -> int | None:
        """Return the step that begins at this position on the schedule; None between the starts of two steps."""
        step = round(position)
        if abs(position - step) > 1e-6:
            return None
        self._visited.add(step)
        return step

    def check_every_step_was_seen(self) -> None:
        """Raise SettingsError where the sampler has not evaluated the network at the start of each step, and ModelError where
        `full_steps` was never called.
        """
        if not len(self.sigmas):
            raise ModelError(
                "model: another node on it calls the network without passing the step or the conditioning, so no cache can "
                "be calibrated; calibrate without that node."
            )
        missing = sorted(set(range(len(self.sigmas) - 1)) - self._visited)
        if missing:
            raise SettingsError(
                f"sampler_name: it does not evaluate the network at the start of step {missing[0]} of the schedule, so that "
                "step cannot be calibrated; calibrate with another sampler, such as euler."
            )

    def load(self, keys: Sequence[Hashable], items: int, position: float, stream: str = "", since: float = 0.0) -> None:
        """Return None, because no feature is reused."""

    def begin(self, position: float) -> None:
        """Do nothing, unlike FeatureCache.begin."""


class StepDistances(_AllSteps):
    """The distances between the features of the steps, summed over calibration runs.

    interval: a feature is compared with those of the last 2 * interval - 1 steps, the farthest that a group reaches.
    """

    def __init__(self, interval: int) -> None:
        super().__init__()
        self._window = 2 * interval
        self._recent: dict[Slot, dict[int, torch.Tensor]] = {}  # the features of the last steps, by step
        self._distance: dict[tuple[int, int], float] = {}  # by (start, step)

    def store(self, keys: Sequence[Hashable], feature: torch.Tensor, position: float, stream: str = "") -> None:
        """Compare the feature of a step [len(keys) * b, ...] with the features of earlier steps.

        The arguments are those of FeatureCache.store. Several evaluations may be at the sigma of one step, because Heun's
        second evaluation is at the sigma of the next step. Only the first of them counts. Evaluations between two steps do not
        count.
        """
        step = self._own_step(position)
        for key, part in zip(keys, feature.detach().chunk(len(keys))):
            recent = self._recent.setdefault((key, stream), {})
            if step is None or step in recent:
                continue
            for old in [old for old in recent if old <= step - self._window]:
                del recent[old]
            for start, held in recent.items():
                distance = (part.float() - held.float()).abs().mean().item()
                self._distance[start, step] = self._distance.get((start, step), 0.0) + distance
            recent[step] = part

    def clear(self) -> None:
        """Forget the features of a run, but not the distances."""
        self._recent.clear()

    def cost(self) -> np.ndarray:
        """Return the table for `group_steps`: the mean |F_s - F_start|, summed over all runs and conditioning entries.

        float64 [steps, steps]; element [start, s].
        """
        steps = range(len(self.sigmas) - 1)
        return np.array([[self._distance.get((start, step), 0.0) for step in steps] for start in steps])


class FeatureFits(_AllSteps):
    """The corrections of the reused features, fitted over calibration runs.

    schedule(steps): returns the full steps of a run of so many steps. terms: the number of the last full steps whose features a
    map combines; 1 in the paper. channel_dim: the dimension of a feature's channels.
    """

    def __init__(self, schedule: Callable[[int], frozenset[int]], terms: int, channel_dim: int) -> None:
        super().__init__()
        self._schedule, self._terms, self._channel_dim = schedule, terms, channel_dim
        self._held: dict[Slot, dict[int, torch.Tensor]] = {}  # the features of the last full steps, by step
        self._fits: dict[tuple[str, int], ChannelFit] = {}  # by (stream, step)
        self.firsts: frozenset[int] = frozenset()
        self.is_reference = True  # whether the next stored feature is that of the full-precision network

    def full_steps(self, sigmas: Sequence[float]) -> frozenset[int]:
        """Return all steps of a run with these sigmas, because the features of all are to be stored. Sets `firsts`."""
        self.firsts = self._schedule(len(sigmas) - 1)
        return super().full_steps(sigmas)

    def store(self, keys: Sequence[Hashable], feature: torch.Tensor, position: float, stream: str = "") -> None:
        """Add the feature of a step [len(keys) * b, ...] to the fits.

        The arguments are those of FeatureCache.store. The feature of the full-precision network comes first. With a quantized
        network, its feature at the same position comes second. A conditioning entry may begin in the middle of a run (start
        percent). It does not count until it has features at all full steps that the map combines.
        """
        step = self._own_step(position)
        for key, part in zip(keys, feature.detach().chunk(len(keys))):
            held = self._held.setdefault((key, stream), {})
            if step in self.firsts:
                held[step] = part
                for old in sorted(held)[: -self._terms]:
                    del held[old]
            elif step is not None and self.is_reference and sorted(held) == self._starts(step):
                fit = self._fits.setdefault((stream, step), ChannelFit(self._channel_dim))
                fit.add([held[start] for start in sorted(held, reverse=True)], part)

    def clear(self) -> None:
        """Forget the features of a run, but not the fits."""
        self._held.clear()

    def _starts(self, step: int) -> list[int]:
        """Return the full steps whose features the map of a step combines, in ascending order."""
        return sorted(first for first in self.firsts if first <= step)[-self._terms :]

    def maps(self) -> dict[str, torch.Tensor]:
        """Return {stream: float32 [steps, C, terms + 1]}.

        A map has, for each channel, the factors of the last full steps' features, the latest first, and then the offset. The
        map of a full step leaves the feature of that step unchanged.
        """
        found: dict[str, torch.Tensor] = {}
        steps = len(self.sigmas) - 1
        for (stream, step), fit in self._fits.items():
            solved = fit.solve().float()
            if stream not in found:
                found[stream] = torch.zeros(steps, solved.shape[0], self._terms + 1)
                found[stream][:, :, 0] = 1
            found[stream][step, :, : solved.shape[1] - 1] = solved[:, :-1]
            found[stream][step, :, -1] = solved[:, -1]
        return found


class ConsumerStatistics:
    """The corrections of the output of the block that consumes the feature, fitted over calibration runs, one per step."""

    def __init__(self, channel_dim: int) -> None:
        self._channel_dim = channel_dim
        self._fits: dict[int, ChannelFit] = {}
        self._reference: torch.Tensor | None = None
        self.is_reference = True  # whether the next output is that of the full-precision network

    def consumed(self, h: torch.Tensor, position: float) -> torch.Tensor:
        """Add the output h of the block, and return it unchanged. At each position the full-precision network comes first, and
        the quantized network second.
        """
        if self.is_reference:
            self._reference = h
        else:
            assert self._reference is not None
            self._fits.setdefault(int(position + 1e-6), ChannelFit(self._channel_dim)).add([h], self._reference)
            self._reference = None
        return h

    def map(self, steps: int) -> torch.Tensor:
        """Return the factor and the offset of each step and channel, float32 [steps, C, 2]."""
        return torch.stack([self._fits[step].solve() for step in range(steps)]).float()


def mapped(tensors: Sequence[torch.Tensor], weights: torch.Tensor, channel_dim: int) -> torch.Tensor:
    """Return a_1 x_1 + .. + a_k x_k + b per channel, computed in float32 and rounded to the dtype of the tensors.

    tensors: x_1 .. x_k, of one shape. weights: a_1 .. a_k and b, [C, k + 1], on the device of the tensors.
    """
    shape = [-1 if dim == channel_dim % tensors[0].ndim else 1 for dim in range(tensors[0].ndim)]
    *factors, total = (column.reshape(shape) for column in weights.float().unbind(1))
    for factor, tensor in zip(factors, tensors):
        total = torch.addcmul(total, factor, tensor.float())
    return total.to(tensors[0].dtype)


@dataclass
class CacheProfile(Profile):
    """The result of a calibration.

    facts: texts about the run and the model ("network", "branch", "interval", ...), to be shown and to check that the profile
    fits a model; FACTS must be among them. fingerprint: float32 [n], weights of the model. sigmas: float64 [steps + 1].
    full_steps: the steps that are evaluated in full, ascending. channel_dim: the dimension of a feature's channels.
    features: {stream: float32 [steps, C, terms + 1]}, see FeatureFits.maps. consumer: float32 [steps, C, 2], the map of the
    output of the block that consumes the feature; None without one.
    """

    KIND, VERSION = "cache profile", "1"

    facts: dict[str, str]
    fingerprint: torch.Tensor
    sigmas: torch.Tensor
    full_steps: tuple[int, ...]
    channel_dim: int
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    consumer: torch.Tensor | None = None

    @property
    def full_steps_text(self) -> str:
        """The steps that are evaluated in full, in the form that the settings `schedule` and `correction_steps` accept."""
        return "steps:" + ",".join(map(str, self.full_steps))

    def content(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors and the metadata to be written."""
        tensors = {"fingerprint": self.fingerprint, "sigmas": self.sigmas, "full_steps": torch.tensor(self.full_steps)}
        tensors.update({f"feature.{stream}": weights for stream, weights in self.features.items()})
        tensors.update({} if self.consumer is None else {"consumer": self.consumer})
        return tensors, {"channel_dim": str(self.channel_dim), "facts": json.dumps(self.facts)}

    @classmethod
    def _of(cls, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> "CacheProfile":
        features = {key.removeprefix("feature."): value for key, value in tensors.items() if key.startswith("feature.")}
        return cls(
            dict(json.loads(about["facts"])), tensors["fingerprint"], tensors["sigmas"], tuple(tensors["full_steps"].tolist()),
            int(about["channel_dim"]), features, tensors.get("consumer"),
        )  # fmt: skip

    def _is_whole(self) -> bool:
        steps = len(self.sigmas) - 1
        maps = [*self.features.values(), *([] if self.consumer is None else [self.consumer])]
        columns = {weights.shape[2] for weights in self.features.values()}
        tensors = (self.fingerprint, self.sigmas, *maps)
        return (
            set(self.facts) >= FACTS
            and all(isinstance(value, str) for value in self.facts.values())
            and int(self.facts["interval"]) >= 1
            and int(self.facts["branch"]) >= -1
            and self.channel_dim in (1, -1)
            and (self.fingerprint.dtype, self.sigmas.dtype) == (torch.float32, torch.float64)
            and self.fingerprint.ndim == self.sigmas.ndim == 1
            and all(isinstance(step, int) and 0 <= step < steps for step in self.full_steps)
            and list(self.full_steps) == sorted({0, *self.full_steps})
            and (columns in ({2}, {3}) or (not columns and len(self.full_steps) == steps))
            and (self.consumer is None or self.consumer.shape[2] == 2)
            and all(weights.ndim == 3 and weights.shape[0] == steps and weights.shape[1] > 0 for weights in maps)
            and all(value.is_floating_point() and value.isfinite().all() for value in tensors)
        )

    def place(self, sigmas: Sequence[float]) -> int:
        """Return the step of the calibrated schedule at which a run with these n + 1 sigmas begins.

        The schedule of the run must be the calibrated one or a contiguous part of it. Raises ProfileError for any other.
        """
        own = torch.as_tensor(sigmas, dtype=torch.float64)
        for first in range(len(self.sigmas) - len(own) + 1):
            part = self.sigmas[first : first + len(own)]
            compared = len(own) - int(own[-1] == 0)  # a run that stops early may end at 0, so a last 0 is not compared
            if not _differ(part[:compared], own[:compared]).any():
                return first
        raise ProfileError(
            f"profile: it was calibrated for {len(self.sigmas) - 1} steps of {self.facts['sampler_name']} on "
            f"{self.facts['scheduler']} from sigma {self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}, but this run has "
            f"{len(own) - 1} steps from {own[0]:.4g} to {own[-1]:.4g}{self._difference(own)}; sample with the calibrated "
            "sampler, scheduler and steps, or calibrate for these."
        )

    def _difference(self, sigmas: torch.Tensor) -> str:
        """Describe the first step at which a schedule differs if its length, first sigma and last sigma are the calibrated
        ones; otherwise return "".
        """
        if len(sigmas) != len(self.sigmas) or _differ(self.sigmas, sigmas)[[0, -1]].any():
            return ""
        step = int(_differ(self.sigmas, sigmas).nonzero()[0])
        return f", and its step {step} begins at {sigmas[step]:.4g} instead of {self.sigmas[step]:.4g}"


def _differ(calibrated: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Return bool [n]: where the sigmas of a run are not those of a calibration, beyond rounding."""
    return ~torch.isclose(calibrated, sigmas, rtol=1e-3, atol=1e-4)


class CorrectedFeatures(FeatureCache):
    """A FeatureCache for one run that corrects the reused features by the maps of a CacheProfile."""

    def __init__(self, profile: CacheProfile) -> None:
        self._terms = next((weights.shape[2] - 1 for weights in profile.features.values()), 1)
        super().__init__("hold" if self._terms == 1 else "linear")
        self._profile = profile
        self._first = 0  # the step of the calibrated schedule at which the run begins
        self._moved: dict[tuple[str | None, torch.device], torch.Tensor] = {}

    def full_steps(self, sigmas: Sequence[float]) -> frozenset[int]:
        """Return the steps of a run with these sigmas that are evaluated in full. Raises ProfileError as CacheProfile.place."""
        self._first = self._profile.place(sigmas)
        own = {step - self._first for step in self._profile.full_steps}
        return frozenset({0, *(step for step in own if 0 <= step < len(sigmas) - 1)})

    def store(self, keys: Sequence[Hashable], feature: torch.Tensor, position: float, stream: str = "") -> None:
        """Keep a feature as FeatureCache.store does, but only at the full steps of the profile and the first step of the run.

        The maps are fitted to features at the full steps. Features that a sampler or a correction evaluates elsewhere are
        ignored. Raises ProfileError where the profile is for another number of channels.
        """
        step = round(position)
        if abs(position - step) < 1e-6 and (step == 0 or step + self._first in self._profile.full_steps):
            self._check_channels(feature, self._profile.features.get(stream))
            super().store(keys, feature, position, stream)

    def _check_channels(self, tensor: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Raise ProfileError where a map, [steps, C, terms + 1], is for another number of channels than a tensor has."""
        channels = tensor.shape[self._profile.channel_dim]
        if weights is not None and weights.shape[1] != channels:
            raise ProfileError(
                f"profile: its corrections are for {weights.shape[1]} channels, but this model has {channels}; calibrate for "
                "this model."
            )

    def _forecast(self, slot: Slot, kept: Kept, position: float) -> torch.Tensor:
        step, weights = self._step(position), self._profile.features.get(slot[1])
        expected = [full for full in self._profile.full_steps if full <= step][-self._terms :]
        if weights is None or [round(at) + self._first for at, _ in kept] != expected:
            return kept[-1][1]  # uncorrected: a run that begins within the schedule has features of other steps at first
        weights = self._on(kept[-1][1].device, slot[1], weights)[step]
        return mapped([feature for _, feature in reversed(kept)], weights, self._profile.channel_dim)

    def _step(self, position: float) -> int:
        """Return the step of the calibrated schedule at a position of the run."""
        return min(int(position + 1e-6) + self._first, len(self._profile.sigmas) - 2)

    def consumed(self, h: torch.Tensor, position: float) -> torch.Tensor:
        """Return the output h of the block that consumes the feature, corrected for the step at this position.

        Raises ProfileError where the profile is for another number of channels.
        """
        if self._profile.consumer is None:
            return h
        self._check_channels(h, self._profile.consumer)
        weights = self._on(h.device, None, self._profile.consumer)[self._step(position)]
        return mapped([h], weights, self._profile.channel_dim)

    def _on(self, device: torch.device, stream: str | None, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights of a stream on a device; stream None: the consumer's.

        The weights are copied once per run, because a copy in each step would wait for the device.
        """
        key = stream, device
        if key not in self._moved:
            self._moved[key] = weights.to(device, torch.float32)
        return self._moved[key]
