"""Caching in the host's diffusion transformers, through the block replacements that they offer.

Branch b runs the b + 1 outermost blocks at each end. A full evaluation keeps the residual that the blocks between these two
ends add to their input, and a cached evaluation adds this residual instead of running these blocks. If a transformer has two
kinds of blocks that pass on different tensors, such as the double and single blocks of Flux, each kind has its own residual.
"""

import inspect
import sys
from dataclasses import dataclass

import torch
from comfy.patcher_extension import WrappersMP

from ..sampling.network_calls import others_take_part
from .cache_run import CacheRun, warn_once

# {name under which blocks can be replaced: attributes in which the host's transformers have these blocks}
LISTS = {
    "double_block": (
        "double_blocks", "double_layers", "joint_blocks", "visual_transformer_blocks", "transformer_blocks", "blocks",
        "transformer.layers", "language_model.layers",
    ),
    "single_block": ("single_blocks", "single_layers"),
}  # fmt: skip
ALIASES = {"double_block": ("double_block", "block"), "single_block": ("single_block",)}
STREAMS = ("img", "txt", "x", "vid")  # tensors that blocks take and pass on; other arguments are the same for all blocks


@dataclass(frozen=True)
class Span:
    """The blocks of one kind, from `first` to `last` inclusive, that a cached evaluation does not run."""

    kind: str
    first: int
    last: int


def find_blocks(network):
    """Return {kind: its blocks} of a transformer of the host; {} if the network has no known blocks."""
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
    """Return whether the source code of the network's classes reads block replacements at all.

    Return True if the source is not available; then the first evaluation shows whether the network calls replacements.
    """
    network = getattr(network, "_orig_mod", network)  # the network inside torch.compile's wrapper
    classes = [cls for cls in type(network).__mro__ if issubclass(cls, torch.nn.Module) and cls is not torch.nn.Module]
    try:
        return any("patches_replace" in inspect.getsource(sys.modules[cls.__module__]) for cls in classes)
    except (KeyError, OSError, TypeError):
        return True


def spans(blocks, branch):
    """Return the Spans between the branch + 1 outermost blocks at each end."""
    begin, end, found, before = branch + 1, sum(map(len, blocks.values())) - branch - 1, [], 0
    for kind, own in blocks.items():
        first, last = max(begin - before, 0), min(end - before, len(own)) - 1
        found += [Span(kind, first, last)] if first <= last else []
        before += len(own)
    return found


def _variant(transformer_options, conditions):
    """Return a key that distinguishes several evaluations of one conditioning entry at one step.

    A guidance such as LTXV's evaluates an entry a second time with something switched off, or without a condition.
    """
    switches = {item for item in transformer_options.items() if isinstance(item[1], (bool, frozenset))}
    return frozenset(switches), frozenset(conditions)


def _run_block(block, args, extra):
    """Run a block through the host's own function, `original_block`, and return its result as a dict.

    The function of Kandinsky 5 cannot be called (ComfyUI 0.33 passes the block arguments with other names), so its blocks are
    called directly. The function of Hunyuan3D 2.1 returns a bare tensor.
    """
    if "time_embed" in args:
        inputs = (args[name] for name in ("x", "context", "time_embed", "freqs"))
        return {"x": block(*inputs, transformer_options=args["transformer_options"])}
    out = extra["original_block"](args)
    return {"x": out} if torch.is_tensor(out) else out


def _streams(values):
    """Return {name: tensor} of the streams in a block's arguments or result.

    The parts of a tuple, such as image and sound, get numbered names.
    """
    found = {}
    for name in STREAMS:
        value = values.get(name)
        parts = {f"{name}.{n}": part for n, part in enumerate(value)} if isinstance(value, (tuple, list)) else {name: value}
        found.update({key: part for key, part in parts.items() if torch.is_tensor(part)})
    return found


def _with_streams(values, tensors):
    """Return a copy of the values with these tensors, which are named as in `_streams`."""
    result = {**values, **{name: tensor for name, tensor in tensors.items() if name in STREAMS}}
    for name in STREAMS:
        if isinstance(value := values.get(name), (tuple, list)):
            result[name] = type(value)(tensors.get(f"{name}.{n}", part) for n, part in enumerate(value))
    return result


def _fits(residual, entered):
    """Return whether there is a residual of the right shape. A node may have changed the number of an entry's text tokens."""
    return residual is not None and residual.shape == entered.shape


class TransformerCache(CacheRun):
    """The cache of a transformer's residuals in one sampling run. model_options: those of the run."""

    channel_dim = -1
    has_consumer = False
    wrapper_type = WrappersMP.APPLY_MODEL

    def __init__(self, settings, features, full_steps=None, model_options=None):
        super().__init__(settings, features, full_steps)
        self._model_options = model_options or {}
        self._names = {}  # {(span, key of a conditioning entry): names of the streams that its blocks pass on}
        self._are_replaced = False  # whether the network has called replacements in this run

    def _begin_full_step(self, step, position):
        super()._begin_full_step(step, position)
        self._names.clear()  # they belong to features that are too old from now on

    @staticmethod
    def check(network, branch):
        """Raise ValueError if the network is not a transformer that can be cached, or has no such branch."""
        blocks = find_blocks(network)
        if not blocks or not lets_blocks_be_replaced(network):
            raise ValueError(
                "model: caching needs a U-Net, such as SD 1.5 or SDXL, or a transformer whose blocks ComfyUI can replace, "
                f"such as Flux, SD3 or Wan; this MODEL is a {type(network).__name__}."
            )
        if branch < 0 or not spans(blocks, branch):
            total = sum(map(len, blocks.values()))
            most = (total - 1) // 2 - 1
            if most < 0:
                raise ValueError(f"model: this transformer has only {total} blocks; caching needs at least 3.")
            raise ValueError(f"branch: {branch} is not possible with this transformer's {total} blocks; choose 0 to {most}.")

    def evaluate(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """Evaluate like the host's apply_model, but run the blocks of the spans or add their residuals."""
        network = executor.class_obj.diffusion_model
        plan = self.plan(x, transformer_options, _variant(transformer_options, kwargs))
        lists = find_blocks(network)  # of the evaluated network: a guider may use another network for the negative conditioning
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
        """Raise ValueError if the network itself does not call the replacements. Warn if another node is the cause.

        Another node, such as another cache, may have left out the network or its blocks.
        """
        options = {**self._model_options, "transformer_options": transformer_options}
        if not self._are_replaced and not others_take_part(options, network):
            raise ValueError(
                f"model: this transformer ({type(network).__name__}) does not let its blocks be replaced, so they cannot be "
                "cached; sample without the cache."
            )
        warn_once("another node on the MODEL skips evaluations of the network or of its blocks; these are not cached")


class _SpanPass:
    """The state of one evaluation in one span."""

    def __init__(self, span, blocks, plan, features, names):
        self.is_done = False
        self._span, self._blocks, self._plan, self._features, self._names = span, blocks, plan, features, names
        self._entered = None  # the streams at the start of the span, in a full evaluation
        self._result = None  # the streams at the end of the span, in a cached evaluation

    def replacements(self, others):
        """Return {block: replacement} for the span. A block that is run uses its existing replacement in `others`, if any."""
        numbers = range(self._span.first, self._span.last + 1)
        places = [(kind, number) for kind in ALIASES[self._span.kind] for number in numbers]
        return {place: self._replacement(*place, others.get(place)) for place in places}

    def _replacement(self, kind, number, other):
        def replacement(args, extra):
            if number == self._span.first:
                self._enter(args)
            if self._result is not None:
                out = args  # only the arguments that are the same for all blocks are used later
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
        """Add the kept residuals if there are any; else keep a copy of the input, because blocks change it in place."""
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
        """Return the result of the span's last block.

        In a cached evaluation, tensors that the host has added between the blocks, such as ControlNet residuals, are dropped:
        the kept residual already contains those of the full evaluation.
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
