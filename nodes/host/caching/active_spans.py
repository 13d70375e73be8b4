"""What happens in a span of blocks during one evaluation: stand-ins in the network's lists see or skip the span's blocks."""

import contextlib
import copy
import functools

import torch

from .streams import Observation, known_streams, method_of, remember_streams, with_parts


class DoesNotFitError(Exception):
    """The kept residuals do not fit: a node may have changed an entry's text tokens, or the blocks, since the full step."""


@contextlib.contextmanager
def standing_in(active):
    """Put the stand-ins of the active spans into the network's lists."""
    before = [(one.span.block_list, one.span.block_list.container) for one in active]
    try:
        for one, (block_list, container) in zip(active, before):
            holding = copy.copy(container)
            holding._modules = one.stand_ins(container._modules)
            block_list.parent._modules[block_list.key] = holding
        yield
    finally:
        for block_list, container in before:
            block_list.parent._modules[block_list.key] = container


EMPTY = torch.nn.Module().__dict__  # the attributes of a module without weights and hooks


class _StandIn(torch.nn.Module):
    """Stands in a network's list for a block: call(run, args, kwargs) decides what the block's call returns.

    Attributes are the block's. hides_weights: whether `run` is not called, so that the host, which may move the weights of the
    modules in a list to the device beforehand, finds none. Otherwise it finds them, under the block's own names.
    """

    def __init__(self, block, call, hides_weights=False):
        # without Module's own constructor and setters, whose time would be a twentieth of a cached step of a small Flux
        own = {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in EMPTY.items()}
        weights = {} if hides_weights else {name: getattr(block, name) for name in ("_modules", "_parameters", "_buffers")}
        self.__dict__.update(own, **weights, _call=call, _is_forward=method_of(block) == "forward", _block=block)

    def __getattr__(self, name):
        return getattr(self.__dict__["_block"], name)

    def __setattr__(self, name, value):
        setattr(self._block, name, value)

    def __delattr__(self, name):
        delattr(self._block, name)

    @property
    def _fsdp_wrapped_module(self):
        """The block: the host's name for a block in a wrapper, where it asks for a block's class (Stable Cascade)."""
        return self._block

    def forward(self, *args, **kwargs):
        return self._call(self._block, args, kwargs) if self._is_forward else self._block(*args, **kwargs)

    def forward_gen(self, *args, **kwargs):
        return self._call(self._block.forward_gen, args, kwargs)


def full_span(span):
    """Return a span for a full evaluation: the first one is observed."""
    return ObservedSpan(span) if known_streams(span.block_list.container, span.last) is None else FullSpan(span)


class FullSpan:
    """A span in an evaluation that runs all its blocks.

    has_run: whether the network has run the span's blocks. feature_names, residuals: filled by the evaluation.
    """

    def __init__(self, span):
        self.span, self.has_run = span, False
        self.feature_names, self.residuals = [], []
        self._streams = known_streams(span.block_list.container, span.last)
        self._entered = []
        self._passes = 0  # through the span's blocks

    def stand_ins(self, blocks):
        """Return {name: module} of a list with stand-ins for the span's first and last block."""
        ends = {self.span.first, self.span.last}
        return {
            name: _StandIn(block, functools.partial(self._call, number)) if number in ends else block
            for number, (name, block) in enumerate(blocks.items())
        }

    def _call(self, number, run, args, kwargs):
        if number == self.span.first:
            # copies, because blocks change their input in place
            self._entered = [tensor.clone() for tensor in self._streams.of_arguments(args, kwargs)]
        out = run(*args, **kwargs)
        if number == self.span.last:
            self._leave(self._streams.of_output(out))
        return out

    def finish(self):
        """If the blocks have run and no residual was found, forget the Streams: the blocks pass on other tensors now.

        The next full evaluation is observed.
        """
        if self.has_run and not self.residuals:
            remember_streams(self.span.block_list.container, self.span.last, None)

    def _leave(self, left):
        self.has_run = True
        if self._entered and [tensor.shape for tensor in left] == [tensor.shape for tensor in self._entered]:
            self.residuals += [after - before for before, after in zip(self._entered, left)]
            number = f".pass {self._passes}" if self._passes else ""
            self.feature_names += [f"{self.span.name}.{name}{number}" for name in self._streams.names]
        self._entered = []
        self._passes += 1


class ObservedSpan(FullSpan):
    """A span in a full evaluation whose streams are not known yet: it also finds them."""

    def __init__(self, span):
        super().__init__(span)
        self._seen = Observation()
        self._given = None  # a copy of the first block's arguments
        self._ends = []  # [(this, a copy of the last block's output)], one for each pass

    def stand_ins(self, blocks):
        """Return {name: module} of a list with a stand-in for each block."""
        return {
            name: _StandIn(block, functools.partial(self._observe, number, block))
            for number, (name, block) in enumerate(blocks.items())
        }

    def _observe(self, number, block, run, args, kwargs):
        self._seen.before(args, kwargs)
        if number == self.span.first:  # copies of all arguments: the streams are not known yet
            self._given = _copied(args), {key: _copied(value) for key, value in kwargs.items()}
        out = run(*args, **kwargs)
        if self.span.first <= number <= self.span.last:
            self._seen.after(block, out)
        if number == self.span.last and self._given is not None:
            self._ends.append((self._given, _copied(out)))
            self._given = None
        return out

    def finish(self):
        """Find the streams, after the evaluation. Raises ValueError like `Observation.streams`."""
        if self._ends:
            self._streams = self._seen.streams()
            remember_streams(self.span.block_list.container, self.span.last, self._streams)
        for given, out in self._ends:
            self._entered = self._streams.of_arguments(*given)
            self._leave(self._streams.of_output(out))


def _copied(value):
    """Return a value with copies of its tensors, also of those in its tuples and lists."""
    return with_parts(value, lambda part: part.clone() if torch.is_tensor(part) else part)


class CachedSpan:
    """A span in an evaluation that adds the kept residuals of its streams instead of running its blocks."""

    def __init__(self, span, residuals):
        self.span, self._residuals = span, residuals
        self._streams = known_streams(span.block_list.container, span.last)
        self._result = None
        self._next = 0  # the first of the residuals of the next pass through the span's blocks

    def stand_ins(self, blocks):
        """Return {name: module} of a list with stand-ins for all blocks of the span."""
        numbers = range(self.span.first, self.span.last + 1)
        return {
            name: _StandIn(block, functools.partial(self._call, number), hides_weights=True) if number in numbers else block
            for number, (name, block) in enumerate(blocks.items())
        }

    def _call(self, number, run, args, kwargs):
        """Pass on what the block was given. The last block returns the result, which was computed at the first.

        So tensors that the host adds between the blocks, such as ControlNet residuals, are dropped: the kept residual already
        contains those of the full evaluation.
        """
        given = self._streams.of_arguments(args, kwargs)
        if not given or (self._result is None and number != self.span.first):
            raise DoesNotFitError
        if number == self.span.first:
            residuals = self._residuals[self._next : self._next + len(given)]
            if [tensor.shape for tensor in given] != [residual.shape for residual in residuals]:
                raise DoesNotFitError
            self._result = [tensor + residual for tensor, residual in zip(given, residuals)]
            self._next += len(given)
        return self._streams.output(self._result if number == self.span.last else given)
