"""Caching in the host's diffusion transformers, at the modules of their blocks.

Branch b runs the b + 1 outermost blocks at each end, branch -1 none. A full evaluation keeps the residuals that the blocks
between these two ends add to their input, and a cached evaluation adds these residuals instead of running these blocks. There
is one for each tensor that a block passes on (a stream): two for Flux's double blocks, one for its single blocks. If a network
runs its blocks several times in one evaluation, each pass has its own.

For the time of one evaluation, and inside all other nodes' wrappers, the network's lists hold stand-ins for some blocks. This
works for every network, compiled or not, that runs the blocks of a list one after another, if nothing outside the span but the
next block uses what a block of the span returns.
"""

import contextlib
import functools
import itertools
import weakref

from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..sampling.network_calls import others_take_part, uncompiled
from .active_spans import CachedSpan, DoesNotFitError, ObservedSpan, full_span, standing_in
from .block_lists import find_lists, outermost_lists, spans, special_class_of
from .cache_run import CacheRun, warn_once, weights_in

# Largest relative difference between a cached and a full evaluation of the same input. They differ only by rounding.
TOLERANCE = 0.02
TRIED = weakref.WeakSet()  # lists of other packs' networks that passed `_check_guess`


def _variant(transformer_options, conditions):
    """Return a key that distinguishes several evaluations of one conditioning entry at one step.

    A guidance such as LTXV's evaluates an entry a second time with something switched off, or without a condition.
    """
    switches = {item for item in transformer_options.items() if isinstance(item[1], (bool, frozenset))}
    return frozenset(switches), frozenset(conditions)


class TransformerCache(CacheRun):
    """The cache of a transformer's residuals in one sampling run. model_options: those of the run."""

    channel_dim = -1
    has_consumer = False
    wrapper_type = WrappersMP.APPLY_MODEL
    arguments = ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options")

    def __init__(self, settings, features, full_steps=None, model_options=None):
        super().__init__(settings, features, full_steps)
        self._model_options = model_options or {}
        self._lists = functools.cache(find_lists)
        self._kept = {}  # {(name of a span, key of a conditioning entry): [(name of a feature, its rows)]}
        self._have_run = False  # whether the network has run the blocks of its lists in this run
        self._is_compiled = False

    def clear(self):
        """Forget the features."""
        super().clear()
        self._kept.clear()

    def _begin_full_step(self, step, position):
        super()._begin_full_step(step, position)
        self._kept.clear()  # it belongs to features that are too old from now on

    @staticmethod
    def cheapest_branch(network):
        """Return the least branch of a network: -1, at which no block runs, or 0.

        Also 0 for a network of another pack's class: a layer after its blocks may need that a block has run.
        """
        network = uncompiled(network)
        is_guess = any(own.is_guess for own in find_lists(network))
        return 0 if is_guess else special_class_of(network).cheapest_branch

    @staticmethod
    def check(network, branch):
        """Raise ValueError if the network is not a transformer that can be cached, or has no such branch."""
        network = uncompiled(network)
        lists, name = find_lists(network), type(network).__name__
        if not lists:
            reason = special_class_of(network).refused or "it has no list of blocks"
            raise ValueError(
                "model: caching needs a U-Net, such as SD 1.5 or SDXL, or a transformer that runs its blocks one after "
                f"another, such as Flux, Z-Image or Wan; this MODEL is a {name}, and {reason}."
            )
        if not spans(lists, branch):
            total = sum(map(len, lists))
            most = (total - 1) // 2 - 1
            choices = f"-1 to {most}" if most > -1 else "-1"
            raise ValueError(
                f"branch: {branch} is not possible with this transformer, which has {total} blocks; choose {choices}."
            )

    @staticmethod
    def feature_names(network, branch):
        """Return the beginnings of the names that the features of a network have."""
        return tuple(f"{span.name}." for span in spans(find_lists(uncompiled(network)), branch))

    @staticmethod
    def cached_share(network, branch):
        """Return about what share of a full evaluation's operations a cached one has, a float, judged by the weights.

        Only weights in lists of modules count: blocks and refiners. Embeddings are used once per picture instead of per token.
        """
        network = uncompiled(network)
        lists = find_lists(network)
        others = sum(map(weights_in, outermost_lists(network))) - sum(weights_in(own.container) for own in lists)
        total = others + sum(weights_in(own.container) * own.tokens_share for own in lists)
        skipped = sum(
            weights_in(block) * span.block_list.tokens_share for span in spans(lists, branch) for block in span.blocks
        )
        return 1 - skipped / max(total, 1)  # another pack may keep its weights elsewhere

    def evaluate(self, executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """Evaluate like the host's apply_model, but keep the spans' residuals, or add them instead of running their blocks."""
        # the evaluated network: a guider may use another one, for the negative conditioning or for a part of the run
        network = uncompiled(executor.class_obj.diffusion_model)
        go_on = functools.partial(self._go_on, executor, (x, t, c_concat, c_crossattn, control), kwargs, network)
        plan = self.plan(x, transformer_options, network, _variant(transformer_options, kwargs))
        special = special_class_of(network)
        if special.own_cache in transformer_options:
            warn_once(
                f"the sampler gives the network a cache of its own ({special.own_cache}); its evaluations are done in full"
            )
            return go_on([], transformer_options)
        replaced = transformer_options.get("patches_replace", {})
        own_spans = spans(self._lists(network), self.settings.branch, replaced.get("dit", {}))
        if not own_spans:
            warn_once(
                "no block can be skipped, because other nodes replace them or the network has too few; these evaluations are "
                "done in full"
            )
        options = _without_prefix_cache(transformer_options) if special.has_prefix_cache else transformer_options
        skip = functools.partial(self._skip, plan, own_spans, special.batch_dim, go_on, options)
        if plan.reuses and (result := skip()) is not None:
            return result
        active = [full_span(span) for span in own_spans if plan.keeps]
        result = go_on(active, options)
        for one in active:
            one.finish()
        self._keep(plan, active, special.batch_dim)
        if not all(one.has_run for one in active):
            self._check_left_out(network, transformer_options)
        if plan.keys and any(span.block_list.is_guess and span.block_list.container not in TRIED for span in own_spans):
            _check_guess(network, own_spans, result, skip())
        return result

    def _skip(self, plan, own_spans, batch_dim, go_on, transformer_options):
        """Return the result of the evaluation without the blocks of the spans, None if there are no residuals that fit."""
        active = self._cached_spans(plan, own_spans, batch_dim)
        if not active:
            return None
        # The error may come through other nodes' wrappers. Then they are called a second time, for the full evaluation.
        with contextlib.suppress(DoesNotFitError):
            return go_on(active, _without_replacements(transformer_options, own_spans))
        return None

    def _go_on(self, executor, args, kwargs, network, active, transformer_options):
        """Go on with the evaluation, with stand-ins in the network while the network itself is evaluated."""

        def innermost(executor, *args, **kwargs):
            self._is_compiled |= executor.class_obj.diffusion_model is not network
            with _uncompiled_if_observed(executor.class_obj, network, active), standing_in(active):
                return executor(*args, **kwargs)

        wrappers = [*executor.wrappers[executor.idx + 1 :], innermost]
        inner = WrapperExecutor.new_class_executor(executor.original, executor.class_obj, wrappers)
        return inner.execute(*args, transformer_options, **kwargs)

    def _cached_spans(self, plan, own_spans, batch_dim):
        """Return the CachedSpan of each span, [] unless each has a kept residual."""
        active = []
        for span in own_spans:
            named = self._kept.get((span.name, plan.keys[0]), [])
            loaded = [plan.load(self.features, rows * len(plan.keys), name) for name, rows in named]
            if not loaded or any(residual is None for residual in loaded):
                return []
            active.append(CachedSpan(span, [residual.movedim(0, batch_dim) for residual in loaded]))
        return active

    def _keep(self, plan, active, batch_dim):
        """Keep the residuals of a full evaluation."""
        for one in active:
            self._have_run |= one.has_run
            named = []
            for name, residual in zip(one.feature_names, one.residuals):
                residual = residual.movedim(batch_dim, 0)
                if residual.shape[0] % len(plan.keys):
                    warn_once("another node divides the network's batch; these evaluations are done in full")
                    return
                # a compiled network may write its next outputs into the same memory (CUDA graphs)
                residual = residual.clone() if self._is_compiled else residual
                self.features.store(plan.keys, residual, plan.position, name)
                named.append((name, residual.shape[0] // len(plan.keys)))
            self._kept.update({(one.span.name, key): named for key in plan.keys})

    def _check_left_out(self, network, transformer_options):
        """Raise ValueError if the network has not run its blocks in this run and no other node takes part.

        Otherwise warn: another node, such as another cache, has left out the network or its blocks.
        """
        options = {**self._model_options, "transformer_options": transformer_options}
        if not self._have_run and not others_take_part(options, network):
            raise ValueError(
                f"model: this transformer ({type(network).__name__}) does not run its blocks one after another, so they cannot "
                "be cached; sample without the cache."
            )
        warn_once("another node on the MODEL skips evaluations of the network or of its blocks; these are not cached")


def _check_guess(network, own_spans, full, cached):
    """Raise ValueError if skipping the blocks of another pack's network changes its result for the same input.

    That is so where a skip connection leaves the skipped blocks. full, cached: the result with and without the blocks; None if
    it is not known yet.
    """
    if cached is None:
        return
    if (full - cached).norm() > TOLERANCE * full.norm():
        raise ValueError(
            f"model: this network ({type(network).__name__}) uses what its blocks return in more places than the next block, "
            "so they cannot be skipped; sample without the cache."
        )
    TRIED.update(span.block_list.container for span in own_spans)


def _without_replacements(transformer_options, own_spans):
    """Return options without other nodes' replacements for the blocks of the spans, so that the network calls the blocks."""
    skipped = set()
    for span in own_spans:
        skipped.update(itertools.product(span.block_list.host_names, range(span.first, span.last + 1)))
    replaced = transformer_options.get("patches_replace", {})
    blocks = {place: value for place, value in replaced.get("dit", {}).items() if place not in skipped}
    return {**transformer_options, "patches_replace": {**replaced, "dit": blocks}}


def _without_prefix_cache(transformer_options):
    """Return options that replace block -1, which no network has.

    A network with a replaced block does not use its prefix cache, for which the blocks would have to return keys and values.
    """
    replaced = transformer_options.get("patches_replace", {})
    blocks = {**replaced.get("dit", {}), ("double_block", -1): None}
    return {**transformer_options, "patches_replace": {**replaced, "dit": blocks}}


@contextlib.contextmanager
def _uncompiled_if_observed(base, network, active):
    """Let the host's model evaluate its network uncompiled if the evaluation is observed, because observers cannot be."""
    before = base.diffusion_model
    if any(isinstance(one, ObservedSpan) for one in active):
        base.diffusion_model = network
    try:
        yield
    finally:
        base.diffusion_model = before
