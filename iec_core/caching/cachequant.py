"""CacheQuant (arXiv 2503.01323): which steps to evaluate in full, and how to correct what the others reuse, learned from runs.

DPS, the schedule: the steps are split into contiguous groups, each of which holds the feature of its first step. Of all splits
into as many groups as a uniform interval N has, each between ceil(N / 2) and 2 N long, the one with the least sum of
|F_s - F_start| is found by dynamic programming.

DEC, the correction: the feature that step s takes up, F_start, is mapped on F_s by an affine map a F + b for each channel,
a = cov / var, the least-squares fit over all prompts, positions and conditioning entries. With a quantized model F_start is
that of the quantized network and F_s that of the full-precision one, so that both errors are corrected; a second map corrects
the output of the block that consumes the feature. Beyond the paper the map may be of the last two full steps' features, which
is a forecast with fitted weights.
"""

import json
import math
from dataclasses import dataclass, field

import torch

from ..devices import has_float64
from ..profile_file import Profile
from .feature_cache import FeatureCache

COLUMNS = 65536  # of a feature's numbers in a channel, how many are summed at a time in float64: for the memory
FACTS = {"network", "branch", "interval", "quantization", "sampler_name", "scheduler"}  # that a profile cannot do without


def group_steps(cost, interval):
    """Return the first steps of the groups with the least total cost, in order.

    cost[i][s], i < s: what it costs that step s holds the feature of step i; a square table over the steps. Groups are between
    ceil(interval / 2) and 2 * interval long and as many as ceil(steps / interval). The minimum is exact.
    """
    total, count = len(cost), math.ceil(len(cost) / interval)
    shortest, longest = min(math.ceil(interval / 2), total // count), 2 * interval
    of_group = [[0.0] for _ in range(total)]  # of_group[i][n - 1]: the cost of a group of n steps that begins at step i
    for first in range(total):
        for step in range(first + 1, min(first + longest, total)):
            of_group[first].append(of_group[first][-1] + float(cost[first][step]))
    best = {0: (0.0, ())}  # by the number of steps that are split already: (cost, the groups' first steps)
    for _ in range(count):
        longer = {}
        for first, (spent, firsts) in best.items():
            for length in range(shortest, min(longest, total - first) + 1):
                candidate = spent + of_group[first][length - 1], (*firsts, first)
                if first + length not in longer or candidate[0] < longer[first + length][0]:
                    longer[first + length] = candidate
        best = longer
    return list(best[total][1])


def _in_float64(x):
    return (x if has_float64(x.device) else x.cpu()).double()


class ChannelFit:
    """The least-squares map of tensors x_1 .. x_k on a tensor y, by channel: y = a_1 x_1 + .. + a_k x_k + b. In float64."""

    def __init__(self, channel_dim):
        self._channel_dim = channel_dim
        self._count, self._sums, self._products = 0, 0.0, 0.0

    def add(self, xs, y):
        """Take up a list of tensors and y, all of one shape."""
        values = [value.movedim(self._channel_dim, 0).flatten(1) for value in (*xs, y)]
        for parts in zip(*(value.split(COLUMNS, dim=1) for value in values)):
            stacked = torch.stack([_in_float64(part) for part in parts], dim=1)  # [C, k + 1, n]
            self._count += stacked.shape[2]
            self._sums = self._sums + stacked.sum(2).cpu()
            self._products = self._products + (stacked @ stacked.mT).cpu()

    def solve(self):
        """Return float64 [C, k + 1], a_1 .. a_k and b. Where the x do not tell, it is a_1 = 1: x_1 is held, and moved by b."""
        mean = self._sums / self._count
        covariance = self._products / self._count - mean[:, :, None] * mean[:, None, :]
        among, with_y = covariance[:, :-1, :-1], covariance[:, :-1, -1]
        change = (torch.linalg.pinv(among, rtol=1e-9, hermitian=True) @ (with_y - among[:, :, 0])[:, :, None])[:, :, 0]
        change[:, 0] += 1  # fitted is y - x_1, so that what the x do not tell falls to x_1
        return torch.cat([change, mean[:, -1:] - (change * mean[:, :-1]).sum(1, keepdim=True)], dim=1)


class _AllSteps:
    """What a calibration run has in a FeatureCache's place: every step is evaluated in full. sigmas: float64, of the run."""

    def __init__(self):
        self.sigmas = None
        self._visited = set()

    def full_steps(self, sigmas):
        """Return all steps of a run of these sigmas."""
        self.sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        return frozenset(range(len(sigmas) - 1))

    def _own_step(self, position):
        """Return the step that begins at this position on the schedule, None where none does."""
        step = round(position)
        if abs(position - step) > 1e-6:
            return None
        self._visited.add(step)
        return step

    def check_every_step_was_seen(self):
        """Raise ValueError where the sampler has not evaluated the network at every step's own sigma."""
        missing = sorted(set(range(len(self.sigmas) - 1)) - self._visited)
        if missing:
            raise ValueError(
                f"sampler_name: it does not evaluate the network where step {missing[0]} of the schedule begins, so that "
                "nothing can be found out for that step; calibrate with another, such as euler."
            )

    def load(self, keys, items, position, stream="", since=0.0):
        """Return None: nothing is reused."""

    def begin(self, position):
        """As FeatureCache.begin."""


class StepDistances(_AllSteps):
    """How far the features of the steps are from each other, over calibration runs.

    interval: bounds how far back a feature may be held.
    """

    def __init__(self, interval):
        super().__init__()
        self._window = 2 * interval
        self._recent = {}
        self._distance = {}

    def store(self, keys, feature, position, stream=""):
        """Take up the feature of a step [len(keys) * b, ...]. Of several evaluations at a step's sigma the first is taken
        (Heun's second one is at the next step's), and those between two steps are not.
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

    def clear(self):
        """Forget a run's features; the distances stay."""
        self._recent.clear()

    def cost(self):
        """Return the table for `group_steps`: the sums over all runs and conditioning entries of the mean |F_s - F_start|."""
        steps = range(len(self.sigmas) - 1)
        return [[self._distance.get((start, step), 0.0) for step in steps] for start in steps]


class FeatureFits(_AllSteps):
    """The corrections of the features that steps take up, over calibration runs.

    schedule(steps): the steps that are to be evaluated in full, the groups' first. terms: how many of the last full steps'
    features the map is of; 1 is the paper's. channel_dim: the dimension of a feature's channels.
    """

    def __init__(self, schedule, terms, channel_dim):
        super().__init__()
        self._schedule, self._terms, self._channel_dim = schedule, terms, channel_dim
        self._held = {}
        self._fits = {}
        self.firsts = frozenset()
        self.is_reference = True  # whether what is stored next is of the full-precision network

    def full_steps(self, sigmas):
        """Return all steps of a run of these sigmas, whose features are to be stored."""
        self.firsts = self._schedule(len(sigmas) - 1)
        return super().full_steps(sigmas)

    def store(self, keys, feature, position, stream=""):
        """Take up the feature of a step [len(keys) * b, ...]. That of the full-precision network comes first, then, if there is
        one, that of the network which is to be corrected, at the same position. An entry that was not there at the full steps
        which its map would be of, because its range of the denoising has only begun, is left out.
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

    def clear(self):
        """Forget a run's features; the fits stay."""
        self._held.clear()

    def _starts(self, step):
        return sorted(first for first in self.firsts if first <= step)[-self._terms :]

    def maps(self):
        """Return {stream: float32 [steps, C, terms + 1]}: the factors of the last full steps' features, the latest first, and
        the offset. Full steps hold their own.
        """
        found, steps = {}, len(self.sigmas) - 1
        for (stream, step), fit in self._fits.items():
            solved = fit.solve().float()
            if stream not in found:
                found[stream] = torch.zeros(steps, solved.shape[0], self._terms + 1)
                found[stream][:, :, 0] = 1
            found[stream][step, :, : solved.shape[1] - 1] = solved[:, :-1]
            found[stream][step, :, -1] = solved[:, -1]
        return found


class ConsumerStatistics:
    """What calibration runs tell about the output of the block that consumes the feature, by step."""

    def __init__(self, channel_dim):
        self._channel_dim = channel_dim
        self._fits = {}
        self._reference = None
        self.is_reference = True  # whether what comes next is of the full-precision network

    def consumed(self, h, position):
        """Take up the block's output h, first the full-precision network's, then the other's, and return h."""
        if self.is_reference:
            self._reference = h
        else:
            self._fits.setdefault(int(position + 1e-6), ChannelFit(self._channel_dim)).add([h], self._reference)
            self._reference = None
        return h

    def map(self, steps):
        """Return float32 [steps, C, 2], factor and offset."""
        return torch.stack([self._fits[step].solve() for step in range(steps)]).float()


def mapped(tensors, weights, channel_dim):
    """Return a_1 x_1 + .. + a_k x_k + b by channel, computed in float32, in the dtype of the tensors.

    weights: [C, k + 1], on their device.
    """
    shape = [-1 if dim == channel_dim % tensors[0].ndim else 1 for dim in range(tensors[0].ndim)]
    *factors, total = (column.reshape(shape) for column in weights.float().unbind(1))
    for factor, tensor in zip(factors, tensors):
        total = torch.addcmul(total, factor, tensor.float())
    return total.to(tensors[0].dtype)


@dataclass
class CacheProfile(Profile):
    """What a calibration has found out.

    facts: of the run and the model, texts, for people and to tell whose profile it is ("network", "branch", "interval", ...).
    fingerprint: float32 [n], weights of the model. sigmas: float64 [steps + 1]. full_steps: those that are evaluated in full.
    channel_dim: of a feature. features: {stream: float32 [steps, C, terms + 1]}, see FeatureFits.maps. consumer: float32
    [steps, C, 2], the map of the output of the block that consumes the feature, or None.
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
    def full_steps_text(self):
        """The steps that are evaluated in full, as `schedule` and `correction_steps` take them."""
        return "steps:" + ",".join(map(str, self.full_steps))

    def content(self):
        """Return what `Profile` wants to know."""
        tensors = {"fingerprint": self.fingerprint, "sigmas": self.sigmas, "full_steps": torch.tensor(self.full_steps)}
        tensors.update({f"feature.{stream}": weights for stream, weights in self.features.items()})
        tensors.update({} if self.consumer is None else {"consumer": self.consumer})
        return tensors, {"channel_dim": str(self.channel_dim), "facts": json.dumps(self.facts)}

    @classmethod
    def _of(cls, tensors, about):
        features = {key.removeprefix("feature."): value for key, value in tensors.items() if key.startswith("feature.")}
        return cls(
            dict(json.loads(about["facts"])), tensors["fingerprint"], tensors["sigmas"], tuple(tensors["full_steps"].tolist()),
            int(about["channel_dim"]), features, tensors.get("consumer"),
        )  # fmt: skip

    def _is_whole(self):
        steps = len(self.sigmas) - 1
        maps = [*self.features.values(), *([] if self.consumer is None else [self.consumer])]
        columns = {weights.shape[2] for weights in self.features.values()}
        tensors = (self.fingerprint, self.sigmas, *maps)
        return (
            set(self.facts) >= FACTS
            and all(isinstance(value, str) for value in self.facts.values())
            and int(self.facts["interval"]) >= 1
            and int(self.facts["branch"]) >= 0
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

    def place(self, sigmas):
        """Return with which step of the calibrated schedule a run of these sigmas begins. Raises ValueError where it is another
        schedule: the run's has to be the calibrated one or a part of it.
        """
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
        for first in range(len(self.sigmas) - len(sigmas) + 1):
            part = self.sigmas[first : first + len(sigmas)]
            ended = len(sigmas) - (sigmas[-1] == 0).int()  # a run that stops early may take its last step to 0
            if torch.allclose(part[:ended], sigmas[:ended], rtol=1e-3, atol=1e-4):
                return first
        raise ValueError(
            f"profile: it was calibrated for {len(self.sigmas) - 1} steps of {self.facts['sampler_name']} on "
            f"{self.facts['scheduler']} from sigma "
            f"{self.sigmas[0]:.4g} to {self.sigmas[-1]:.4g}, and this run has {len(sigmas) - 1} steps from {sigmas[0]:.4g} to "
            f"{sigmas[-1]:.4g}{self._difference(sigmas)}; sample with the calibrated sampler, scheduler and steps, or "
            "calibrate for these."
        )

    def _difference(self, sigmas):
        """Return where sigmas of as many steps and the same ends differ from the calibrated ones, in words; else nothing."""
        if len(sigmas) != len(self.sigmas) or not torch.allclose(sigmas[[0, -1]], self.sigmas[[0, -1]], rtol=1e-3, atol=1e-4):
            return ""
        step = int((sigmas - self.sigmas).abs().gt(1e-3 * self.sigmas + 1e-4).nonzero()[0])
        return f", whose step {step} begins at {sigmas[step]:.4g} instead of {self.sigmas[step]:.4g}"


class CorrectedFeatures(FeatureCache):
    """A FeatureCache for one run that maps what it holds on what the steps should take up, as a CacheProfile says."""

    def __init__(self, profile):
        self._terms = next((weights.shape[2] - 1 for weights in profile.features.values()), 1)
        super().__init__("hold" if self._terms == 1 else "linear")
        self._profile = profile
        self._first = 0
        self._moved = {}

    def full_steps(self, sigmas):
        """Return the frozenset of the steps of this run that are evaluated in full. Raises ValueError as CacheProfile.place."""
        self._first = self._profile.place(sigmas)
        own = {step - self._first for step in self._profile.full_steps}
        return frozenset({0, *(step for step in own if 0 <= step < len(sigmas) - 1)})

    def store(self, keys, feature, position, stream=""):
        """As FeatureCache.store, for the profile's full steps, of whose features its maps are, and for a run's first step. What
        a sampler or a correction evaluates elsewhere is not taken.
        """
        step = round(position)
        if abs(position - step) < 1e-6 and (step == 0 or step + self._first in self._profile.full_steps):
            self._check_channels(feature, self._profile.features.get(stream))
            super().store(keys, feature, position, stream)

    def _check_channels(self, tensor, weights):
        """Raise ValueError where a map is for another number of channels than a tensor has."""
        channels = tensor.shape[self._profile.channel_dim]
        if weights is not None and weights.shape[1] != channels:
            raise ValueError(
                f"profile: its corrections are for {weights.shape[1]} channels, and this model has {channels} there; calibrate "
                "for this model."
            )

    def _forecast(self, slot, kept, position):
        step, weights = self._step(position), self._profile.features.get(slot[1])
        expected = [full for full in self._profile.full_steps if full <= step][-self._terms :]
        if weights is None or [round(at) + self._first for at, _ in kept] != expected:
            return kept[-1][1]  # a run that begins within the schedule holds others at first: it goes without correction
        weights = self._on(kept[-1][1].device, slot[1], weights)[step]
        return mapped([feature for _, feature in reversed(kept)], weights, self._profile.channel_dim)

    def _step(self, position):
        return min(int(position + 1e-6) + self._first, len(self._profile.sigmas) - 2)

    def consumed(self, h, position):
        """Return what the block that consumes the feature gave, h, corrected for the step at this position."""
        if self._profile.consumer is None:
            return h
        self._check_channels(h, self._profile.consumer)
        weights = self._on(h.device, None, self._profile.consumer)[self._step(position)]
        return mapped([h], weights, self._profile.channel_dim)

    def _on(self, device, stream, weights):
        """Return the weights of a stream, None the consumer's, on a device. They move once a run: in every step that would wait
        for the device.
        """
        key = stream, device
        if key not in self._moved:
            self._moved[key] = weights.to(device, torch.float32)
        return self._moved[key]
