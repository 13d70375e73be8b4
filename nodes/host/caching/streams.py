"""What the blocks of a list pass on: which of a block's arguments are what the block before it has returned.

Nobody has to say this for each network: it is seen in one evaluation in which all blocks run. There, a tensor that a block
returns is an argument of the next block. Where the network makes another tensor of it in between, the shape decides.
"""

import inspect
import weakref
from dataclasses import dataclass

import torch


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
        """Return the streams in a block's arguments, [] if these are not those of the observed evaluation."""
        found = [_follow(args, kwargs, path) for path in self.paths]
        return found if all(map(torch.is_tensor, found)) else []

    def of_output(self, out):
        """Return the streams in a block's output."""
        return [tensor for _, tensor in _tensors(out)]

    def output(self, tensors):
        """Return what a block would return that has these streams as its result."""
        return _filled(self.structure, tensors)


KNOWN = weakref.WeakKeyDictionary()  # {module with the blocks: Streams}


class Observation:
    """Finds the Streams of a list while all its blocks run."""

    def __init__(self):
        self._returned = []  # the tensors that the last block has returned
        self._same = {}  # {number of an output tensor: path of the argument that the next block took it as}
        self.block = self._structure = None  # the last block seen, and its output's structure
        self._shapes, self._out_shapes = [], []  # [(path, shape)] of its arguments, and the shapes of the tensors it returned

    def before(self, args, kwargs):
        """See the arguments of a block that is about to run."""
        given = _arguments(args, kwargs)
        for number, tensor in enumerate(self._returned):
            for path, other in given:
                if _is_same(tensor, other):
                    self._same.setdefault(number, path)
        self._returned = []
        return [(path, tensor.shape) for path, tensor in given]

    def after(self, block, shapes, out):
        """See the output of a block. shapes: as `before` returned them."""
        self.block, self._shapes = block, shapes
        self._returned = [tensor for _, tensor in _tensors(out)]
        self._structure, self._out_shapes = _structure(out), [tensor.shape for tensor in self._returned]

    def streams(self, method):
        """Return the Streams. Raises ValueError if a block returns a tensor that is none of its arguments' kind.

        method: the name of the blocks' method that was called.
        """
        paths = dict(self._same)
        for number, shape in enumerate(self._out_shapes):
            if number not in paths:
                fitting = [path for path, own in self._shapes if own == shape and path not in paths.values()]
                if not fitting:
                    raise ValueError(
                        f"model: its blocks ({type(self.block).__name__}) return a tensor that they do not take, so they "
                        "cannot be skipped; sample without the cache."
                    )
                paths[number] = fitting[0]
        ordered = tuple(paths[number] for number in range(len(self._out_shapes)))
        return Streams(ordered, tuple(_name(self.block, method, path) for path in ordered), self._structure)


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


def _structure(out, counted=None):
    """Return a block's output with a Leaf in place of each tensor."""
    counted = iter(range(len(_tensors(out)))) if counted is None else counted
    if isinstance(out, (tuple, list)):
        return type(out)(_structure(part, counted) for part in out)
    return Leaf(next(counted)) if torch.is_tensor(out) else out


def _filled(structure, tensors):
    if isinstance(structure, Leaf):
        return tensors[structure.stream]
    if isinstance(structure, (tuple, list)):
        return type(structure)([_filled(part, tensors) for part in structure])
    return structure


def _name(block, method, path):
    """Return the name of the argument at a path, with the places within it: `hidden_states`, `x.0`."""
    key, *inside = path
    if isinstance(key, int):
        block = getattr(block, "_orig_mod", block)  # the block inside torch.compile's wrapper
        parameters = list(inspect.signature(getattr(type(block), method)).parameters)[1:]  # without self
        key = parameters[key] if key < len(parameters) else key
    return ".".join(map(str, (key, *inside)))
