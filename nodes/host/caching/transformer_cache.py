"""Caching in the host's diffusion transformers, at the modules of their blocks.

Branch b runs the b + 1 outermost blocks at each end. A full evaluation keeps the residual that the blocks between these two
ends add to their input, and a cached evaluation adds this residual instead of running these blocks. If a transformer has two
kinds of blocks that pass on different tensors, such as the double and single blocks of Flux, each kind has its own residual. So
has each pass through the blocks, if a network makes several in one evaluation.

For the time of one evaluation, and inside all other nodes' wrappers, the network's lists hold stand-ins for some blocks. So it
holds for every network that runs the blocks of a list one after another, compiled or not, whatever other hooks it reads.
"""

import contextlib
import copy
import functools

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..sampling.network_calls import others_take_part
from .block_lists import family_of, find_lists, spans
from .cache_run import CacheRun, warn_once
from .streams import KNOWN, Observation


class DoesNotFitError(Exception):
    """A kept residual does not fit: a node may have changed the number of an entry's text tokens since the full step."""


def _variant(transformer_options, conditions):
    """Return a key that distinguishes several evaluations of one conditioning entry at one step.

    A guidance such as LTXV's evaluates an entry a second time with something switched off, or without a condition.
    """
    switches = {item for item in transformer_options.items() if isinstance(item[1], (bool, frozenset))}
    return frozenset(switches), frozenset(conditions)


def _uncompiled(network):
    """Return the network inside torch.compile's wrapper."""
    return getattr(network, "_orig_mod", network)


class TransformerCache(CacheRun):
    """The cache of a transformer's residuals in one sampling run. model_options: those of the run."""

    channel_dim = -1
    has_consumer = False
    wrapper_type = WrappersMP.APPLY_MODEL

    def __init__(self, settings, features, full_steps=None, model_options=None):
        super().__init__(settings, features, full_steps)
        self._model_options = model_options or {}
        self._lists = {}  # {network: its BlockLists}
        self._kept = {}  # {(name of a span, key of a conditioning entry): [(name of a feature, its rows)]}
        self._have_run = False  # whether the network has run the blocks of its lists in this run

    def _begin_full_step(self, step, position):
        super()._begin_full_step(step, position)
        self._kept.clear()  # it belongs to features that are too old from now on

    @staticmethod
    def check(network, branch):
        """Raise ValueError if the network is not a transformer that can be cached, or has no such branch."""
        network = _uncompiled(network)
        lists, name = find_lists(network), type(network).__name__
        if not lists:
            reason = family_of(network).refused or "it has no list of blocks"
            raise ValueError(
                "model: caching needs a U-Net, such as SD 1.5 or SDXL, or a transformer that runs its blocks one after "
                f"another, such as Flux, Z-Image or Wan; this MODEL is a {name}, and {reason}."
            )
        if branch < 0 or not spans(lists, branch):
            total = sum(map(len, lists))
            most = (total - 1) // 2 - 1
            if most < 0:
                raise ValueError(f"model: this transformer has only {total} blocks; caching needs at least 3.")
            raise ValueError(f"branch: {branch} is not possible with this transformer's {total} blocks; choose 0 to {most}.")

    @staticmethod
    def feature_names(network, branch):
        """Return the beginnings of the names that the features of a network have."""
        return tuple(f"{span.name}." for span in spans(find_lists(_uncompiled(network)), branch))

    def evaluate(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """Evaluate like the host's apply_model, but run the blocks of the spans or add their residuals."""
        call = functools.partial(self._call, executor, (x, t, c_concat, c_crossattn, control), kwargs)
        plan = self.plan(x, transformer_options, _variant(transformer_options, kwargs))
        # the evaluated network: a guider may use another one for the negative conditioning
        network = _uncompiled(executor.class_obj.diffusion_model)
        family = family_of(network)
        if family.own_cache in transformer_options:
            warn_once(
                f"the sampler gives the network a cache of its own ({family.own_cache}); its evaluations are done in full"
            )
            return call(network, [], transformer_options)
        replaced = transformer_options.get("patches_replace", {})
        own = spans(self._lists_of(network), self.settings.branch, replaced.get("dit", {}))
        options = _without_prefix_cache(transformer_options) if family.has_prefix_cache else transformer_options
        if plan.reuses and (passes := self._cached_passes(plan, own, family.batch_dim)):
            with contextlib.suppress(DoesNotFitError):
                return call(network, passes, _without_replacements(options, own))
        passes = [FullPass(span) if span.list.container in KNOWN else ObservedPass(span) for span in own if plan.keeps]
        result = call(network, passes, options)
        for one in passes:
            one.finish()
        self._keep(plan, passes, family.batch_dim)
        if not all(one.has_run for one in passes):
            self._check_left_out(network, transformer_options)
        return result

    def _lists_of(self, network):
        if network not in self._lists:
            self._lists[network] = find_lists(network)
        return self._lists[network]

    def _call(self, executor, args, kwargs, network, passes, transformer_options):
        """Go on with the evaluation, with stand-ins in the network while the network itself is evaluated."""

        def innermost(executor, *args, **kwargs):
            with _plainly(executor.class_obj, network, passes), _standing_in(passes):
                return executor(*args, **kwargs)

        wrappers = [*executor.wrappers[executor.idx + 1 :], innermost]
        inner = WrapperExecutor.new_class_executor(executor.original, executor.class_obj, wrappers)
        return inner.execute(*args, transformer_options, **kwargs)

    def _cached_passes(self, plan, own, batch_dim):
        """Return the CachedPass of each span, [] unless each has a kept residual."""
        passes = []
        for span in own:
            named = self._kept.get((span.name, plan.keys[0]), [])
            loaded = [plan.load(self.features, rows * len(plan.keys), name) for name, rows in named]
            if not loaded or any(residual is None for residual in loaded):
                return []
            passes.append(CachedPass(span, [residual.movedim(0, batch_dim) for residual in loaded]))
        return passes

    def _keep(self, plan, passes, batch_dim):
        """Keep the residuals of a full evaluation."""
        for one in passes:
            self._have_run |= one.has_run
            named = []
            for name, residual in zip(one.names, one.residuals):
                residual = residual.movedim(batch_dim, 0)
                self.features.store(plan.keys, residual, plan.position, name)
                named.append((name, residual.shape[0] // len(plan.keys)))
            self._kept.update({(one.span.name, key): named for key in plan.keys})

    def _check_left_out(self, network, transformer_options):
        """Raise ValueError if the network itself does not run its blocks. Warn if another node is the cause.

        Another node, such as another cache, may have left out the network or its blocks.
        """
        options = {**self._model_options, "transformer_options": transformer_options}
        if not self._have_run and not others_take_part(options, network):
            raise ValueError(
                f"model: this transformer ({type(network).__name__}) does not run its blocks one after another, so they cannot "
                "be cached; sample without the cache."
            )
        warn_once("another node on the MODEL skips evaluations of the network or of its blocks; these are not cached")


def _without_replacements(transformer_options, own):
    """Return options without other nodes' replacements for the blocks of the spans, so that the network calls the blocks."""
    skipped = {(name, number) for span in own for name in span.list.names for number in range(span.first, span.last + 1)}
    replaced = transformer_options.get("patches_replace", {})
    blocks = {place: value for place, value in replaced.get("dit", {}).items() if place not in skipped}
    return {**transformer_options, "patches_replace": {**replaced, "dit": blocks}}


def _without_prefix_cache(transformer_options):
    """Return options in which a block that no network has is replaced, so that the network computes all its tokens anew.

    Otherwise the blocks would have to return the keys and values that the network keeps.
    """
    replaced = transformer_options.get("patches_replace", {})
    blocks = {**replaced.get("dit", {}), ("double_block", -1): None}
    return {**transformer_options, "patches_replace": {**replaced, "dit": blocks}}


@contextlib.contextmanager
def _plainly(base, network, passes):
    """Let the host's model evaluate its network uncompiled if the evaluation is observed, because observers cannot be."""
    before = base.diffusion_model
    if any(isinstance(one, ObservedPass) for one in passes):
        base.diffusion_model = network
    try:
        yield
    finally:
        base.diffusion_model = before


@contextlib.contextmanager
def _standing_in(passes):
    """Put the passes' stand-ins into the network's lists."""
    before = [(one.span.list, one.span.list.container) for one in passes]
    try:
        for one, (own, container) in zip(passes, before):
            holding = copy.copy(container)
            holding._modules = one.stand_ins(container._modules)
            own.parent._modules[own.key] = holding
        yield
    finally:
        for own, container in before:
            own.parent._modules[own.key] = container


NO_WEIGHTS = torch.nn.Module().__dict__  # the attributes of a module without weights and hooks


class _StandIn(torch.nn.Module):
    """Stands in a network's list for a block: call(run, args, kwargs) decides what the block's call returns."""

    def __init__(self, block, call, shows_weights):
        # without Module's own constructor and setters, whose time would be a twentieth of a cached step of a small Flux
        own = {name: value.copy() if isinstance(value, (dict, set)) else value for name, value in NO_WEIGHTS.items()}
        if shows_weights:  # the host moves the weights of the modules in a list to the device beforehand
            own.update(_modules=block._modules, _parameters=block._parameters, _buffers=block._buffers)
        # the block is not a submodule: weights keep their names in the network
        self.__dict__.update(own, _block=block, _call=call, _is_forward=method_of(block) == "forward")

    def __getattr__(self, name):
        return getattr(self.__dict__["_block"], name)

    @property
    def _fsdp_wrapped_module(self):
        """The block: the host's name for a block in a wrapper, where it asks for a block's class (Stable Cascade)."""
        return self._block

    def forward(self, *args, **kwargs):
        return self._call(self._block, args, kwargs) if self._is_forward else self._block(*args, **kwargs)

    def forward_gen(self, *args, **kwargs):
        return self._call(self._block.forward_gen, args, kwargs)


def method_of(block):
    """Return the name of the method by which a network runs a block. Wan Animate 2 has another one for its pose branch."""
    return "forward_gen" if hasattr(block, "forward_gen") else "forward"


class FullPass:
    """A span in an evaluation that runs all its blocks.

    has_run: whether the network has run the span's blocks. names, residuals: of its features, filled by the evaluation.
    """

    has_run = False

    def __init__(self, span):
        self.span = span
        self.names, self.residuals = [], []
        self._streams = KNOWN.get(span.list.container)
        self._entered = []
        self._passes = 0  # through the span's blocks

    def stand_ins(self, blocks):
        """Return {name: module} of a list with stand-ins for the span's first and last block."""
        ends = {self.span.first, self.span.last}
        return {
            name: _StandIn(block, functools.partial(self._call, number), True) if number in ends else block
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
        """After the evaluation, forget what the blocks pass on if they have passed on something else. Then the next full
        evaluation is observed.
        """
        if self.has_run and not self.residuals:
            KNOWN.pop(self.span.list.container, None)

    def _leave(self, left):
        self.has_run = True
        if self._entered and [tensor.shape for tensor in left] == [tensor.shape for tensor in self._entered]:
            self.residuals += [after - before for before, after in zip(self._entered, left)]
            number = f".pass {self._passes}" if self._passes else ""
            self.names += [f"{self.span.name}.{name}{number}" for name in self._streams.names]
        self._entered = []
        self._passes += 1


class ObservedPass(FullPass):
    """The first full pass of a list: it also finds what its blocks pass on."""

    def __init__(self, span):
        super().__init__(span)
        self._seen = Observation()
        self._given = None  # a copy of what the span's first block took
        self._ends = []  # this, and a copy of what its last block returned, for each pass

    def stand_ins(self, blocks):
        """Return {name: module} of a list with a stand-in for each block."""
        return {
            name: _StandIn(block, functools.partial(self._observe, number, block), True)
            for number, (name, block) in enumerate(blocks.items())
        }

    def _observe(self, number, block, run, args, kwargs):
        shapes = self._seen.before(args, kwargs)
        if number == self.span.first:
            self._given = _copied(args), {key: _copied(value) for key, value in kwargs.items()}
        out = run(*args, **kwargs)
        if self.span.first <= number <= self.span.last:
            self._seen.after(block, shapes, out)
        if number == self.span.last and self._given is not None:
            self._ends.append((self._given, _copied(out)))
            self._given = None
        return out

    def finish(self):
        """Find the streams, after the evaluation. Raises ValueError like `Observation.streams`."""
        if self._ends:
            self._streams = KNOWN[self.span.list.container] = self._seen.streams(method_of(self._seen.block))
        for given, out in self._ends:
            self._entered = self._streams.of_arguments(*given)
            self._leave(self._streams.of_output(out))


def _copied(value):
    """Return a value with copies of its tensors, also of those in its tuples and lists."""
    if isinstance(value, (tuple, list)):
        return type(value)([_copied(part) for part in value])
    return value.clone() if torch.is_tensor(value) else value


class CachedPass:
    """A span in an evaluation that adds the kept residuals of its streams instead of running its blocks."""

    def __init__(self, span, residuals):
        self.span, self._residuals = span, residuals
        self._streams = KNOWN[span.list.container]
        self._result = None
        self._next = 0  # the first of the residuals of the next pass through the span's blocks

    def stand_ins(self, blocks):
        """Return {name: module} of a list with stand-ins for all blocks of the span."""
        numbers = range(self.span.first, self.span.last + 1)
        return {
            name: _StandIn(block, functools.partial(self._call, number), False) if number in numbers else block
            for number, (name, block) in enumerate(blocks.items())
        }

    def _call(self, number, run, args, kwargs):
        """Pass on what the block was given. The last block returns the result, which was computed at the first.

        So tensors that the host adds between the blocks, such as ControlNet residuals, are dropped: the kept residual already
        contains those of the full evaluation.
        """
        given = self._streams.of_arguments(args, kwargs)
        if number == self.span.first:
            residuals = self._residuals[self._next : self._next + len(given)]
            if not given or [tensor.shape for tensor in given] != [residual.shape for residual in residuals]:
                raise DoesNotFitError
            self._result = [tensor + residual for tensor, residual in zip(given, residuals)]
            self._next += len(given)
        return self._streams.output(self._result if number == self.span.last else given)
