"""Caching in the host's diffusion transformers, through the replacements that they offer for their blocks.

Branch b runs the b + 1 outermost blocks at either end. What a full evaluation keeps is the residual that the blocks between
add to what enters them, and a cached evaluation adds it again. Where a transformer's blocks are of two kinds, as Flux's double
and single ones, which hand on different tensors, either kind has a residual of its own.
"""

import inspect
import sys
from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP

from ..sampling.network_calls import others_take_part
from .cache_run import CacheRun, warn_once

# Where the host's transformers have their blocks, and the name under which these can be replaced.
LISTS = {
    "double_block": (
        "double_blocks", "double_layers", "joint_blocks", "visual_transformer_blocks", "transformer_blocks", "blocks",
        "transformer.layers", "language_model.layers",
    ),
    "single_block": ("single_blocks", "single_layers"),
}  # fmt: skip
ALIASES = {"double_block": ("double_block", "block"), "single_block": ("single_block",)}
STREAMS = ("img", "txt", "x", "vid")  # what a block may take and hand on; other arguments are the same for all of them


@dataclass(frozen=True)
class Span:
    """The blocks of one kind from `first` to `last` that a cached evaluation does not run."""

    kind: str
    first: int
    last: int


def find_blocks(network):
    """Return {kind: its blocks} of a transformer of the host; {} where it has none that are known."""
    found = {}
    for kind, places in LISTS.items():
        for place in places:
            blocks = network
            for name in place.split("."):
                blocks = getattr(blocks, name, None)
            if isinstance(blocks, torch.nn.ModuleList):
                found[kind] = blocks
                break
    return found if "double_block" in found else {}


def lets_blocks_be_replaced(network):
    """Tell whether the code of the network's classes reads replacements at all. True where there is no code to look into: the
    first evaluation finds out then.
    """
    network = getattr(network, "_orig_mod", network)  # what torch.compile has wrapped
    classes = [cls for cls in type(network).__mro__ if issubclass(cls, torch.nn.Module) and cls is not torch.nn.Module]
    try:
        return any("patches_replace" in inspect.getsource(sys.modules[cls.__module__]) for cls in classes)
    except (KeyError, OSError, TypeError):
        return True


def spans(blocks, branch):
    """Return the Spans between the branch + 1 outermost blocks at either end."""
    begin, end, found, before = branch + 1, sum(map(len, blocks.values())) - branch - 1, [], 0
    for kind, own in blocks.items():
        first, last = max(begin - before, 0), min(end - before, len(own)) - 1
        found += [Span(kind, first, last)] if first <= last else []
        before += len(own)
    return found


def _variant(transformer_options, conditions):
    """Return what tells the evaluations of one conditioning entry at one step apart: a guidance, such as LTXV's, switches
    something off in the second one, or leaves a condition out.
    """
    switches = {item for item in transformer_options.items() if isinstance(item[1], (bool, frozenset))}
    return frozenset(switches), frozenset(conditions)


def _run_block(block, args, extra):
    """Return what the host's own function for running the block returns.

    Kandinsky 5 has one that cannot be called (ComfyUI 0.33 passes the block arguments of other names), so that its blocks are
    called here; Hunyuan3D 2.1 has one that returns the bare tensor.
    """
    if "time_embed" in args:
        inputs = (args[name] for name in ("x", "context", "time_embed", "freqs"))
        return {"x": block(*inputs, transformer_options=args["transformer_options"])}
    out = extra["original_block"](args)
    return {"x": out} if torch.is_tensor(out) else out


def _streams(values):
    """Return {name: tensor} of the streams in what a block is given or returns; a tuple, as of picture and sound, has numbered
    names.
    """
    found = {}
    for name in STREAMS:
        value = values.get(name)
        parts = {f"{name}.{n}": part for n, part in enumerate(value)} if isinstance(value, (tuple, list)) else {name: value}
        found.update({key: part for key, part in parts.items() if torch.is_tensor(part)})
    return found


def _with_streams(values, tensors):
    """Return a copy of the values with these tensors, named as by `_streams`."""
    result = {**values, **{name: tensor for name, tensor in tensors.items() if name in STREAMS}}
    for name in STREAMS:
        if isinstance(value := values.get(name), (tuple, list)):
            result[name] = type(value)(tensors.get(f"{name}.{n}", part) for n, part in enumerate(value))
    return result


def _fits(residual, entered):
    """Tell whether there is a residual, and for as many tokens: a node may have changed an entry's text since."""
    return residual is not None and residual.shape == entered.shape


class TransformerCache(CacheRun):
    """One sampling run's cache of a transformer's residuals. model_options: the run's."""

    channel_dim = -1
    has_consumer = False
    wrapper_type = WrappersMP.APPLY_MODEL

    def __init__(self, settings, features, full_steps=None, model_options=None):
        super().__init__(settings, features, full_steps)
        self._model_options = model_options or {}
        self._names = {}  # of each span and conditioning entry: the streams that its blocks hand on
        self._are_replaced = False  # whether replacements were called in the run

    def _begin_full_step(self, step, position):
        super()._begin_full_step(step, position)
        self._names.clear()  # of features that are too old from now on

    @staticmethod
    def check(network, branch):
        """Raise ValueError where the network is no transformer that can be cached, or has no such branch."""
        blocks = find_blocks(network)
        if not blocks or not lets_blocks_be_replaced(network):
            raise ValueError(
                "model: caching needs a U-Net such as those of SD 1.5 or SDXL, or a transformer whose blocks the host lets be "
                f"replaced, such as Flux, SD3 or Wan; this MODEL is a {type(network).__name__}."
            )
        if branch < 0 or not spans(blocks, branch):
            total = sum(map(len, blocks.values()))
            raise ValueError(
                f"branch: of this transformer's {total} blocks, branches 0 to {(total - 1) // 2 - 1} leave some to cache, and "
                f"{branch} is none of these."
            )

    def evaluate(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """As the host's apply_model, with the spans' blocks run or their residuals added."""
        network = executor.class_obj.diffusion_model
        plan = self.plan(x, transformer_options, _variant(transformer_options, kwargs))
        lists = find_blocks(network)  # of the network that is evaluated: a guider may have another one for the negative
        found = spans(lists, self.settings.branch)
        passes = [_SpanPass(span, lists[span.kind], plan, self.features, self._names) for span in found]
        replaced = transformer_options.get("patches_replace", {})
        blocks = dict(replaced.get("dit", {}))
        for one in passes:
            blocks.update(one.replacements(blocks))
        options = {**transformer_options, "patches_replace": {**replaced, "dit": blocks}}
        result = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        self._are_replaced |= any(one.is_done for one in passes)
        if not all(one.is_done for one in passes):
            self._check_left_out(network, transformer_options)
        return result

    def _check_left_out(self, network, transformer_options):
        """Raise ValueError where it is the network that did not call the replacements, and not another node, such as another
        cache, that left out the network or its blocks.
        """
        options = {**self._model_options, "transformer_options": transformer_options}
        if not self._are_replaced and not others_take_part(options, network):
            raise ValueError(
                f"model: this transformer ({type(network).__name__}) does not let its blocks be "
                "replaced, so that they cannot be cached; sample without it."
            )
        warn_once("another node on the MODEL leaves out evaluations of the network, or of its blocks; these are not cached")


class _SpanPass:
    """One evaluation's way through a span."""

    def __init__(self, span, blocks, plan, features, names):
        self.is_done = False
        self._span, self._blocks, self._plan, self._features, self._names = span, blocks, plan, features, names
        self._entered = None  # what came into the span, in a full evaluation
        self._result = None  # what goes out of it, in a cached one

    def replacements(self, others):
        """Return {block: replacement} for the span, calling the `others` that are there already where a block is run."""
        numbers = range(self._span.first, self._span.last + 1)
        places = [(kind, number) for kind in ALIASES[self._span.kind] for number in numbers]
        return {place: self._replacement(*place, others.get(place)) for place in places}

    def _replacement(self, kind, number, other):
        def replacement(args, extra):
            if number == self._span.first:
                self._enter(args)
            if self._result is not None:
                out = args  # thrown away, but for what is the same for all blocks
            elif other is not None:
                out = other(args, extra)
                out = {"x": out} if torch.is_tensor(out) else out
            else:
                out = _run_block(self._blocks[number], args, extra)
            out = self._leave(out) if number == self._span.last else out
            return out["x"] if kind == "block" and "x" in args else out  # Hunyuan3D 2.1 takes the bare tensor

        return replacement

    def _stream(self, name):
        return f"{self._span.kind}.{self._span.first}.{name}"

    def _enter(self, args):
        """Take up the residuals if there are any, else note what comes in: blocks change it in place."""
        entered = _streams(args)
        if self._plan.reuses:
            names = self._names.get((self._span, self._plan.keys[0]), ())
            loaded = {name: self._load(name, entered[name].shape[0]) for name in names}
            if loaded and all(_fits(residual, entered[name]) for name, residual in loaded.items()):
                self._result = {name: entered[name] + residual for name, residual in loaded.items()}
                return
        if self._plan.keeps:
            self._entered = {name: value.clone() for name, value in entered.items()}

    def _load(self, name, items):
        return self._plan.load(self._features, items, self._stream(name))

    def _leave(self, out):
        """Return what goes out. In a cached evaluation, what the host has added between the blocks, such as a ControlNet's
        residuals for them, is dropped: the kept residual has the like.
        """
        self.is_done = True
        if self._result is not None:
            return _with_streams(out, self._result)
        if self._entered is not None:
            left = _streams(out)
            for key in self._plan.keys:
                self._names[self._span, key] = tuple(left)
            for name, value in left.items():
                residual = value - self._entered[name]
                self._features.store(self._plan.keys, residual, self._plan.position, self._stream(name))
        self._entered = None
        return out
