"""DeepCache (arXiv 2312.00858): which steps are evaluated in full, and the deep features kept between them."""

import math
import re
from dataclasses import dataclass

import torch

SCHEDULE_FORMS = "uniform, power:15,1.4 (center, power) or steps:0,5,9"
KEPT = {"auto": 2, "hold": 1, "linear": 2, "quadratic": 3}  # how many features each forecast goes by
FORECASTS = tuple(KEPT)

# Of the straight line's trials at the full steps, how much of one counts at the next.
REMEMBERED = 0.5
# How much of the straight line is taken before it was tried.
UNTRIED = 0.25


@dataclass(frozen=True)
class CacheSchedule:
    """Which steps are evaluated in full. kind: "uniform", "power" (numbers: center, power), "steps" (numbers: the steps)."""

    kind: str
    numbers: tuple[float, ...] = ()

    def full_steps(self, total, interval):
        """Return the frozenset of full steps in a run of `total` steps; the first always is.

        uniform: the first of every `interval` steps. power: as many steps as that, which crowd around the center, the paper's
        non-uniform schedule (section 3.3): l^p + c, rounded down, for l evenly spaced from the p-th root of -c to that of
        total - c, with the sign kept. Steps that coincide are taken once.

        Raises ValueError where a step or the center is none of the run's.
        """
        if self.kind == "uniform":
            return frozenset(range(0, total, interval))
        outside = max(self.numbers if self.kind == "steps" else self.numbers[:1])
        if outside >= total:
            raise ValueError(
                f"schedule: it names step {outside:g}, and the run has {total} steps, numbered from 0 to {total - 1}; name "
                "steps of the run only."
            )
        if self.kind == "steps":
            return frozenset({0, *map(int, self.numbers)})
        center, power = self.numbers
        count = math.ceil(total / interval)
        low, high = (math.copysign(abs(end) ** (1 / power), end) for end in (-center, total - center))
        places = [low + (high - low) * number / count for number in range(count)]
        steps = {math.floor(math.copysign(abs(place) ** power, place) + center + 1e-9) for place in places}
        return frozenset({0, *(step for step in steps if 0 <= step < total)})


def parse_cache_schedule(text):
    """Parse a `schedule` text. Raises ValueError, with a sentence that lists the forms, for anything else."""
    compact = re.sub(r"\s+", "", text).lower()
    if compact == "uniform":
        return CacheSchedule("uniform")
    if match := re.fullmatch(r"steps:(\d+(?:,\d+)*)", compact):
        return CacheSchedule("steps", tuple(int(part) for part in match[1].split(",")))
    if match := re.fullmatch(r"power:(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", compact):
        center, power = float(match[1]), float(match[2])
        if power >= 1:
            return CacheSchedule("power", (center, power))
        raise ValueError(f"schedule: '{text}' has a power below 1; the paper uses 1.2 to 1.6.")
    raise ValueError(f"schedule: '{text}' is not a known form; write {SCHEDULE_FORMS}.")


def extrapolation_weights(positions, position):
    """Return the weights of the values at `positions` (distinct floats) in the polynomial through them, at `position`."""
    weights = []
    for one in positions:
        others = [other for other in positions if other != one]
        weights.append(math.prod((position - other) / (one - other) for other in others))
    return weights


class _LineTrials:
    """How much of the straight line through the last two features should be taken, by how near it came at the full steps.

    At a full step the true feature is there: of the line's move away from the held feature, the share is taken that would have
    met it best in the squares' sum, <true - held, line - held> / |line - held|^2, over the trials so far, of which each
    counts REMEMBERED times the next; 0 is the held feature, 1 the line. One share for each item of the batch, left on the
    device.
    """

    def __init__(self):
        self._met, self._moved = 0.0, 0.0

    def add(self, held, line, true):
        """Try the line at a full step: held, line and true features [b, ...]."""
        move, should = ((x - held).flatten(1).float() for x in (line, true))
        self._met = REMEMBERED * self._met + torch.linalg.vecdot(should, move)
        self._moved = REMEMBERED * self._moved + torch.linalg.vecdot(move, move)

    def share(self, like):
        """Return the share, from 0 to 1, as a tensor that broadcasts over `like` [b, ...]."""
        if not torch.is_tensor(self._moved):
            return like.new_full((), UNTRIED)
        share = (self._met / self._moved).nan_to_num(0, 1, 0).clamp(0, 1)  # features that never move leave nothing to share
        return share.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


class FeatureCache:
    """The deep features of the last full evaluations, one slice for each conditioning entry that was in the batch.

    A host may evaluate its conditioning entries in one batch or apart, in any order: a feature is found by the keys of
    its entries, never by its place in a batch. forecast: "hold" keeps the last feature; "linear" and "quadratic" carry the last
    two, three forward along the positions at which they were stored; "auto" takes as much of the straight line as its trials at
    the full steps bore out, for each item of the batch.
    """

    def __init__(self, forecast="hold"):
        self._kept = KEPT[forecast]
        self._begun = []
        self._slices = {}
        self._trials = {} if forecast == "auto" else None

    def begin(self, position):
        """Tell that a full step begins at `position`, since when features are loaded from now on. Entries that no longer come,
        as of context windows that move from step to step, are dropped once no forecast goes by so old a feature.
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

    def store(self, keys, feature, position, stream=""):
        """Keep `feature` [len(keys) * b, ...]: equal slices along dimension 0, one a key. It is not copied: nobody else
        may change it.

        position: where on the schedule it was evaluated, in steps; a feature at the same position is replaced. stream: which
        feature, where an evaluation has several.
        """
        for key, part in zip(keys, feature.detach().chunk(len(keys))):
            slot = key, stream
            before = [(at, old) for at, old in self._slices.get(slot, []) if old.shape == part.shape]
            kept = [(at, old) for at, old in before if at != position]
            if self._trials is not None and len(kept) == len(before) == 2:  # a replaced feature was tried already
                self._trials.setdefault(slot, _LineTrials()).add(kept[-1][1], _on_polynomial(kept, position), part)
            self._slices[slot] = [*kept, (position, part)][-self._kept :]

    def load(self, keys, items, position, stream="", since=-math.inf):
        """Return the feature at `position` for a batch of these entries with `items` rows in all, as a tensor of its own, or
        None where an entry has none, none that was stored at `since` or later, or where the batch size has changed.
        """
        slots = [(key, stream) for key in keys]
        parts = [self._slices.get(slot, [(-math.inf, None)]) for slot in slots]
        if any(part[-1][0] < since or part[-1][1] is None or part[-1][1].shape[0] * len(keys) != items for part in parts):
            return None
        return torch.cat([self._forecast(slot, kept, position) for slot, kept in zip(slots, parts)])

    def _forecast(self, slot, kept, position):
        """Return the feature of a slot at a position, by what is kept of it: (position, feature), the newest last."""
        if self._trials is None or len(kept) < 2:
            return _on_polynomial(kept, position)
        held = kept[-1][1]
        return torch.lerp(held, _on_polynomial(kept, position), self._trials.get(slot, _LineTrials()).share(held))

    def clear(self):
        """Forget every feature, and what was learned from them."""
        self._slices.clear()
        self._begun = []
        if self._trials is not None:
            self._trials.clear()


def _on_polynomial(kept, position):
    """Return the value at `position` of the polynomial through the (position, tensor) in `kept`."""
    weights = extrapolation_weights([at for at, _ in kept], position)
    first, *rest = zip(weights, (feature for _, feature in kept))
    total = first[1] if not rest else first[0] * first[1]
    for weight, feature in rest:
        total = torch.add(total, feature, alpha=weight)
    return total
