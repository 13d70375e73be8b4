"""The settings that a search tries: ways to sample, each at several levels of cost."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

NONE = "none"


@dataclass(frozen=True)
class Way:
    """A way to sample, apart from how much of the network a run evaluates.

    sampler, scheduler: the host's names. weights, cache, correction: names that the caller gives a meaning to; "none" leaves
    the model as it is. The default values change nothing.
    """

    sampler: str
    scheduler: str
    weights: str = NONE
    cache: str = NONE
    correction: str = NONE

    def changes(self, other: "Way") -> list[tuple[str, str]]:
        """Return (field, own value) of each field in which this way differs from another."""
        names = [field.name for field in fields(self)]
        return [(name, getattr(self, name)) for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Candidate:
    """A way at a level of cost, from 1 (cheapest) on: its number of steps, or with a cache its number of full steps."""

    way: Way
    level: int


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    own: the user's own way. options: {field of Way: values to try}, without the own one, those that help most often first.
    levels(way): the number of its levels. expected(candidate): its expected cost as a share of the full run's, which rises with
    the level; it only decides what is tried first. fits(way): whether the parts of a way can be combined.
    making(way): what making the model of a way costs, in full runs; what costs less is tried first.
    """

    own: Way
    options: Mapping[str, Sequence[str]]
    levels: Callable[[Way], int]
    expected: Callable[[Candidate], float]
    fits: Callable[[Way], bool] = lambda way: True
    making: Callable[[Way], float] = lambda way: 0.0

    @property
    def full(self) -> Candidate:
        """The full run: the user's own way at its highest level."""
        return Candidate(self.own, self.levels(self.own))

    def neighbours(self, way: Way) -> Iterator[Way]:
        """Return the ways that differ from a way in one field."""
        for name, values in self.options.items():
            for value in dict.fromkeys((*values, getattr(self.own, name))):
                other = replace(way, **{name: value})
                if other != way and self.fits(other):
                    yield other

    def all(self) -> Iterator[Candidate]:
        """Return every candidate, for an exhaustive search."""
        names = list(self.options)
        values = [dict.fromkeys((getattr(self.own, name), *self.options[name])) for name in names]
        for chosen in itertools.product(*values):
            way = replace(self.own, **dict(zip(names, chosen)))
            if self.fits(way):
                yield from (Candidate(way, level) for level in range(1, self.levels(way) + 1))
