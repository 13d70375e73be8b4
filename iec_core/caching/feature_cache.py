"""DeepCache (arXiv 2312.00858): which steps are evaluated in full, and the deep features that are kept between these steps."""

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ..errors import SettingsError

SCHEDULE_FORMS = "auto, uniform, power:15,1.4 (center, power) or steps:0,5,9"
KEPT = {"auto": 2, "hold": 1, "linear": 2, "quadratic": 3}  # how many kept features each forecast uses
FORECASTS = tuple(KEPT)

# "auto": the factor by which the weight of a trial of the straight line shrinks at each later trial.
REMEMBERED = 0.5
# "auto": before the first trial of the straight line, a forecast goes this share of the way from the held feature to the line.
UNTRIED = 0.25

Slot = tuple[Hashable, str]  # (key of a conditioning entry, stream)
Kept = Sequence[tuple[float, torch.Tensor]]  # (position, feature [b, ...]) of one slot, the newest last


@dataclass(frozen=True)
class CacheSchedule:
    """Which steps are evaluated in full.

    kind: "auto" or "uniform" (no numbers), "power" (numbers: center, power) or "steps" (numbers: the full steps). "auto" goes
    by the noise levels of the run: see `placement.full_steps_by_noise`.
    """

    kind: str
    numbers: tuple[float, ...] = ()

    def of(self, total: int, interval: int | Fraction) -> frozenset[int]:
        """Return the full steps of a run of `total` steps. Step 0 is always one of them.

        uniform: the first of every `interval` steps; a fraction is rounded down. power: the paper's non-uniform schedule
        (section 3.3), dense around the center c. Its steps are l^p + c, rounded down, for as many l as uniform has steps,
        evenly spaced from the p-th root of -c up to, but without, the p-th root of total - c. Roots and powers keep the sign.
        Equal steps are taken once, so it may have fewer steps.

        Raises SettingsError where a step or the center is not a step of the run, and for "auto", which has no steps without the
        noise levels.
        """
        if self.kind == "auto":
            raise SettingsError("schedule: auto goes by the noise levels of a run; see placement.full_steps_by_noise.")
        if self.kind == "uniform":
            return frozenset(math.floor(number * interval) for number in range(math.ceil(total / interval)))
        outside = max(self.numbers if self.kind == "steps" else self.numbers[:1])
        if outside >= total:
            raise SettingsError(
                f"schedule: it names step {outside:g}, but the run has {total} steps, numbered from 0 to {total - 1}; name "
                "only steps of the run."
            )
        if self.kind == "steps":
            return frozenset({0, *map(int, self.numbers)})
        center, power = self.numbers
        count = math.ceil(total / interval)
        low, high = (math.copysign(abs(end) ** (1 / power), end) for end in (-center, total - center))
        places = [low + (high - low) * number / count for number in range(count)]
        steps = {math.floor(math.copysign(abs(place) ** power, place) + center + 1e-9) for place in places}
        return frozenset({0, *(step for step in steps if 0 <= step < total)})


def parse_cache_schedule(text: str, forms: str = SCHEDULE_FORMS) -> CacheSchedule:
    """Parse a `schedule` setting in one of SCHEDULE_FORMS. Raises SettingsError for another text, and for a power below 1.

    forms: the forms that the error lists, where a caller accepts more of them.
    """
    compact = re.sub(r"\s+", "", text).lower()
    if compact in ("auto", "uniform"):
        return CacheSchedule(compact)
    if match := re.fullmatch(r"steps:(\d{1,9}(?:,\d{1,9})*)", compact):
        return CacheSchedule("steps", tuple(int(part) for part in match[1].split(",")))
    if match := re.fullmatch(r"power:(\d{1,9}(?:\.\d{1,9})?),(\d{1,9}(?:\.\d{1,9})?)", compact):
        center, power = float(match[1]), float(match[2])
        if power >= 1:
            return CacheSchedule("power", (center, power))
        raise SettingsError(f"schedule: '{text}' has a power below 1; write 1 or more (the paper uses 1.2 to 1.6).")
    raise SettingsError(f"schedule: '{text}' is not a known form; write {forms}.")


def extrapolation_weights(positions: Sequence[float], position: float) -> list[float]:
    """Return the Lagrange weights of the values at `positions`: their weighted sum is the value at `position` of the polynomial
    through these values. positions: distinct.
    """
    weights = []
    for one in positions:
        others = [other for other in positions if other != one]
        weights.append(math.prod((position - other) / (one - other) for other in others))
    return weights


class _LineTrials:
    """The share of the straight line through the last two features that forecasts best, learned from trials at full steps.

    A forecast is held + share * (line - held): 0 is the held feature, 1 the line. At a full step the true feature is known, so
    that the line can be tried: the least-squares share is <true - held, line - held> / |line - held|^2, where both products are
    summed over the trials so far. Each trial has REMEMBERED times the weight of the next. There is one share per item of the
    batch, left on the device.
    """

    def __init__(self) -> None:
        self._met: torch.Tensor | float = 0.0  # the sum of <true - held, line - held>: 0.0, or float32 [b] after a trial
        self._moved: torch.Tensor | float = 0.0  # the sum of |line - held|^2, likewise

    def add(self, held: torch.Tensor, line: torch.Tensor, true: torch.Tensor) -> None:
        """Add the trial at a full step, with the held feature, the line's and the true one [b, ...]."""
        move, should = ((x - held).flatten(1).float() for x in (line, true))
        self._met = REMEMBERED * self._met + torch.linalg.vecdot(should, move)
        self._moved = REMEMBERED * self._moved + torch.linalg.vecdot(move, move)

    def share(self, like: torch.Tensor) -> torch.Tensor:
        """Return the share, from 0 to 1, in the dtype of `like` [b, ...] and in a shape that broadcasts over it."""
        if not torch.is_tensor(self._moved):
            return like.new_full((), UNTRIED)
        share = (self._met / self._moved).nan_to_num(0, 1, 0).clamp(0, 1)  # 0 / 0 where the features never moved
        return share.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class FeatureCache:
    """The deep features of the last full evaluations, in one slice per conditioning entry that was in the batch.

    A host may evaluate its conditioning entries in one batch or in several, in any order. A slice is therefore found by the key
    of its entry, never by its place in a batch.

    forecast: "hold" returns the last feature. "linear" and "quadratic" extrapolate the last two or three features as a
    polynomial of the positions at which they were stored. "auto" goes from the last feature towards the linear forecast, by a
    share that it learns at the full steps for each item of the batch.
    """

    def __init__(self, forecast: str = "hold") -> None:
        self._kept = KEPT[forecast]
        self._begun: list[float] = []  # the positions of the last full steps, as many as the forecast uses
        self._slices: dict[Slot, Kept] = {}
        self._trials: dict[Slot, _LineTrials] | None = {} if forecast == "auto" else None

    def begin(self, position: float) -> None:
        """Note that a full step begins at `position`, in steps.

        The features of entries that are no longer evaluated, such as those of context windows that move from step to step, are
        dropped once they are older than the full steps that the forecast uses.
        """
        if position not in self._begun:
            self._begun = [*self._begun, position][-self._kept :]
        if len(self._begun) < self._kept:
            return
        oldest = min(self._begun)
        for slot in [slot for slot, kept in self._slices.items() if kept[-1][0] < oldest]:
            del self._slices[slot]
            if self._trials is not None:
                self._trials.pop(slot, None)

    def store(self, keys: Sequence[Hashable], feature: torch.Tensor, position: float, stream: str = "") -> None:
        """Keep `feature` [len(keys) * b, ...], which consists of equal slices along dimension 0, one per key.

        The feature is not copied, so the caller must not change it afterwards. position: where on the schedule it was
        evaluated, in steps; a feature that was stored at the same position is replaced. stream: the name of the feature, where
        one evaluation has several.
        """
        for key, part in zip(keys, feature.detach().chunk(len(keys))):
            slot = key, stream
            before = [(at, old) for at, old in self._slices.get(slot, []) if old.shape == part.shape]
            kept = [(at, old) for at, old in before if at != position]
            if self._trials is not None and len(kept) == len(before) == 2:  # a replaced feature is not tried again
                self._trials.setdefault(slot, _LineTrials()).add(kept[-1][1], _on_polynomial(kept, position), part)
            self._slices[slot] = [*kept, (position, part)][-self._kept :]

    def load(
        self, keys: Sequence[Hashable], items: int, position: float, stream: str = "", since: float = -math.inf
    ) -> torch.Tensor | None:
        """Return the forecast [items, ...] at `position` for a batch of the entries with these keys, as a new tensor.

        items: the rows of the batch. Returns None where an entry has no feature, or none that was stored at position `since` or
        later, where the number of rows per entry has changed, and where the entries' features have different shapes.
        """
        slots = [(key, stream) for key in keys]
        parts = [self._slices.get(slot, []) for slot in slots]
        if any(not kept or kept[-1][0] < since or kept[-1][1].shape[0] * len(keys) != items for kept in parts):
            return None
        if len({kept[-1][1].shape for kept in parts}) > 1:
            return None
        return torch.cat([self._forecast(slot, kept, position) for slot, kept in zip(slots, parts)])

    def _forecast(self, slot: Slot, kept: Kept, position: float) -> torch.Tensor:
        """Return the forecast of a slot's feature at a position. kept: what the slot has, at least one feature."""
        if self._trials is None or len(kept) < 2:
            return _on_polynomial(kept, position)
        held = kept[-1][1]
        return torch.lerp(held, _on_polynomial(kept, position), self._trials.get(slot, _LineTrials()).share(held))

    def clear(self) -> None:
        """Forget all features and all trials."""
        self._slices.clear()
        self._begun = []
        if self._trials is not None:
            self._trials.clear()


def _on_polynomial(kept: Kept, position: float) -> torch.Tensor:
    """Return the value at `position` of the polynomial through the features in `kept`."""
    weights = extrapolation_weights([at for at, _ in kept], position)
    first, *rest = zip(weights, (feature for _, feature in kept))
    total = first[1] if not rest else first[0] * first[1]
    for weight, feature in rest:
        total = torch.add(total, feature, alpha=weight)
    return total
