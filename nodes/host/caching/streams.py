"""Which tensors one block of a list passes on to the next: its streams.

They are found in one full evaluation: a tensor that a block returns is an argument of the next block. If the network copies or
reshapes it in between, the first argument of the same shape is taken.
"""

import inspect
import itertools
import weakref
from dataclasses import dataclass

import torch

from ..sampling.network_calls import uncompiled


@dataclass(frozen=True)
class Leaf:
    """The place of a tensor in a block's output: the number of its stream."""

    stream: int


@dataclass(frozen=True)
class Streams:
    """The tensors that the blocks of a list take and return.

    paths: where a block's arguments have each: the position or name of the argument, and the places within tuples. names: for
    each, the name of the argument. structure: a block's output, with a Leaf in place of each tensor.
    """

    paths: tuple
    names: tuple
    structure: object

    def of_arguments(self, args, kwargs):
        """Return the tensors at the paths in a block's arguments, [] if a path has no tensor."""
        found = [_follow(args, kwargs, path) for path in self.paths]
        return found if all(map(torch.is_tensor, found)) else []

    def of_output(self, out):
        """Return the streams in a block's output."""
        return [tensor for _, tensor in _tensors(out)]

    def output(self, tensors):
        """Return what a block would return that has these streams as its result."""
        return with_parts(self.structure, lambda part: tensors[part.stream] if isinstance(part, Leaf) else part)


_known = weakref.WeakKeyDictionary()  # {container of a BlockList: {number of the last block of a span: the span's Streams}}


def known_streams(container, last):
    """Return the Streams of the blocks up to number `last` of a list, None if they have not been observed.

    The list's last block may return less than the others (SD3's: no text).
    """
    return _known.get(container, {}).get(last)


def remember_streams(container, last, streams):
    """Keep the Streams of the blocks up to number `last` of a list; None forgets them."""
    _known.setdefault(container, {})[last] = streams


def method_of(block):
    """Return the name of the method by which a network runs a block.

    Wan Animate 2 runs a block by `forward_gen` for the video and by `forward_pose` for the pose. Only the first is skipped.
    """
    return "forward_gen" if hasattr(block, "forward_gen") else "forward"


class Observation:
    """Finds the Streams of a list while all its blocks run."""

    def __init__(self):
        self._given = []  # [(path, shape)] of the arguments of the block that runs
        self._returned = []  # [(path, tensor)] of the output of the block before it
        self._same = {}  # {path in an output: path of the argument that the next block took it as}
        self._block = self._structure = None  # the last block whose output was seen, and its output's structure
        self._taken, self._left = [], []  # [(path, shape)] of its arguments and of its output

    def before(self, args, kwargs):
        """See the arguments of a block that is about to run."""
        given = _arguments(args, kwargs)
        for place, tensor in self._returned:
            for path, other in given:
                if _is_same(tensor, other):
                    self._same.setdefault(place, path)
        self._returned = []
        self._given = [(path, tensor.shape) for path, tensor in given]

    def after(self, block, out):
        """See the output of that block."""
        self._returned = _tensors(out)
        self._block, self._structure = block, _structure(out)
        self._taken, self._left = self._given, [(place, tensor.shape) for place, tensor in self._returned]

    def streams(self):
        """Return the Streams. Raises ValueError if the blocks return anything but tensors of the shapes that they take."""
        paths = {place: self._same[place] for place, shape in self._left if (self._same.get(place), shape) in self._taken}
        for place, shape in self._left:
            fitting = [path for path, own in self._taken if own == shape and path not in paths.values()]
            paths.update({place: fitting[0]} if place not in paths and fitting else {})
        if not self._left or len(paths) < len(self._left):
            raise ValueError(
                f"model: its blocks ({type(uncompiled(self._block)).__name__}) do not return tensors like those that they "
                "take, so they cannot be skipped; sample without the cache."
            )
        ordered = tuple(paths[place] for place, _ in self._left)
        return Streams(ordered, tuple(_name(self._block, path) for path in ordered), self._structure)


def _tensors(value, path=()):
    """Return [(path, tensor)] of a value, also of those in its tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [found for number, part in enumerate(value) for found in _tensors(part, (*path, number))]
    return [(path, value)] if torch.is_tensor(value) else []


def _arguments(args, kwargs):
    """Return [(path, tensor)] of a call's arguments."""
    return [found for key, value in (*enumerate(args), *kwargs.items()) for found in _tensors(value, (key,))]


def _follow(args, kwargs, path):
    """Return what is at a path in a call's arguments, None if there is nothing."""
    key, *inside = path
    value = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
    for number in inside:
        value = value[number] if isinstance(value, (tuple, list)) and number < len(value) else None
    return value


def _is_same(tensor, other):
    """Return whether two tensors are one, or views of the same numbers."""
    return tensor is other or (
        tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.stride() == other.stride()
    )


def with_parts(value, function):
    """Return a value with function(part) for each of its parts, if it is a tuple or list; else function(value)."""
    if not isinstance(value, (tuple, list)):
        return function(value)
    parts = [with_parts(part, function) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple takes its parts one by one


def _structure(out):
    """Return a block's output with a Leaf in place of each tensor."""
    numbers = itertools.count()
    return with_parts(out, lambda part: Leaf(next(numbers)) if torch.is_tensor(part) else part)


def _name(block, path):
    """Return the name of the argument at a path, with the places within it: `hidden_states`, `x.0`."""
    key, *inside = path
    if isinstance(key, int):
        block = uncompiled(block)
        parameters = list(inspect.signature(getattr(type(block), method_of(block))).parameters.values())[1:]  # without self
        named = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
        key = named[key] if key < len(named) else key
    return ".".join(map(str, (key, *inside)))
