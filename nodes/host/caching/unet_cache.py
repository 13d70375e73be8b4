"""DeepCache on the host's U-Nets, through the host's hooks, without a copy of the forward pass or changed blocks in the model.

Branch b runs the b + 1 outermost skip connections: input blocks 0..b and the last b + 1 output blocks. A full evaluation keeps
the feature that enters the first of these output blocks, and a cached evaluation reuses it. A cached evaluation is the host's
own forward pass over a shallow copy of the U-Net, in which the other blocks pass on a tensor without channels, at no cost.
"""

import copy

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, TimestepEmbedSequential, Upsample
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from .cache_run import CacheRun, weights_in


def _weights_per_position(block):
    """Return the number of a block's weights that are used at every position, without those of the time embedding."""
    embedding = sum(weights_in(layer.emb_layers) for layer in block.modules() if hasattr(layer, "emb_layers"))
    return weights_in(block) - embedding


class _Skipped(torch.nn.Module):
    """A skipped block: it passes on no channels, so that the host's concatenations stay empty."""

    def forward(self, x):
        return x[:, :0]


class _Told(torch.nn.Module):
    """An additional last layer of a block, which passes the block's output through `told`."""

    def __init__(self, told):
        super().__init__()
        self._told = told

    def forward(self, x):
        return self._told(x)


class UnetCache(CacheRun):
    """The cache of a U-Net's deep feature in one sampling run. consumed: see CacheRun."""

    channel_dim = 1
    has_consumer = True
    wrapper_type = WrappersMP.DIFFUSION_MODEL
    arguments = ("x", "timesteps", "context", "y", "control", "transformer_options")

    def __init__(self, settings, features, full_steps=None, consumed=None, model_options=None):
        super().__init__(settings, features, full_steps)
        self.branch = settings.branch
        self.first = None  # number of the first output block that a cached evaluation runs
        self._consumed = consumed

    @staticmethod
    def cheapest_branch(unet):
        """Return the least branch of a network."""
        return 0

    @staticmethod
    def check(unet, branch):
        """Raise ValueError if the U-Net has no such branch."""
        blocks = len(unet.output_blocks)
        if branch >= blocks:
            raise ValueError(f"branch: {branch} is not possible with this U-Net; choose -1 to {blocks - 1}.")

    @staticmethod
    def cached_share(unet, branch):
        """Return about what share of a full evaluation's operations a cached one has, a float, judged by the weights.

        Each weight counts as often as the latent's level of resolution has positions.
        """
        level, inputs, outputs = 0, [], []
        for block in unet.input_blocks:
            level += any(isinstance(layer, Downsample) for layer in block)
            inputs.append(_weights_per_position(block) / 4**level)
        deepest = _weights_per_position(unet.middle_block) / 4**level if unet.middle_block is not None else 0
        for block in unet.output_blocks:
            outputs.append(_weights_per_position(block) / 4**level)
            level -= any(isinstance(layer, Upsample) for layer in block)
        run = sum(inputs[: branch + 1]) + sum(outputs[len(outputs) - branch - 1 :])
        return run / max(sum(inputs) + deepest + sum(outputs), 1)

    @staticmethod
    def feature_names(unet, branch):
        """Return the beginnings of the names that the features have: there is one, without a name."""
        return ("",)

    @torch.compiler.disable(recursive=False)
    def evaluate(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        """Evaluate the U-Net in full and keep the deep feature, or evaluate only the shallow blocks with the kept feature.

        torch.compile does not compile this method, because in each step the method decides again which blocks run.
        torch.compile compiles only the network's forward pass: once over all blocks, and once over the shallow blocks.
        """
        plan, network, control, options, kept = self._prepare(executor.class_obj, x, control, transformer_options)
        inner = WrapperExecutor.new_class_executor(network._forward, network, executor.wrappers, executor.idx + 1)
        output = inner.execute(x, timesteps, context, y, control, options, **kwargs)
        self._store(plan, kept)
        return output

    @torch.compiler.disable
    def _prepare(self, unet, x, control, options):
        """Return (Plan, network, control, options, list that receives the feature to keep) for the evaluation of x."""
        if options.get("patches", {}).get("middle_block_after_patch"):
            raise ValueError(
                "model: a cache leaves out the middle block, but a patch of another node, such as SUPIR, needs that block in "
                "every step; use either that node or the cache."
            )
        self.first = len(unet.output_blocks) - 1 - self.branch
        plan, network, kept = self.plan(x, options, unet), unet, []
        feature = plan.load(self.features, x.shape[0]) if plan.reuses else None
        if feature is not None:
            network, control = self._shallow(unet), self._shallow_control(control)
            options = self._at_feature(self._without_skipped_patches(options), self._resuming(feature, unet))
        elif plan.keeps:
            # Clone: other patches may change the tensor in place. A list: a compiled network cannot look up keys.
            options = self._at_feature(options, lambda h, options: kept.append(h.clone()) or h)
        if self._consumed is not None and plan.position is not None:
            network = self._telling(network, plan.position)
        return plan, network, control, options, kept

    @torch.compiler.disable
    def _store(self, plan, kept):
        for feature in kept:
            self.features.store(plan.keys, feature, plan.position)

    def _at_feature(self, transformer_options, replace):
        """Return options in which the input h of the first shallow output block becomes replace(h, options).

        This happens before any other patch, so that other patches get the same input as without the cache.
        """
        first = ("output", self.first)

        def patch(h, hsp, options):
            return replace(h, options) if options["block"] == first else h, hsp

        patches = transformer_options.get("patches", {})
        patches = {**patches, "output_block_patch": [patch, *patches.get("output_block_patch", [])]}
        return {**transformer_options, "patches": patches}

    def _resuming(self, feature, unet):
        """Return a function for `_at_feature` that continues with the kept feature.

        It also advances the host's transformer index past the transformers in the skipped blocks.
        """
        skipped = [*unet.input_blocks[self.branch + 1 :], unet.middle_block, *unet.output_blocks[: self.first]]
        layers = [layer for block in skipped if block is not None for layer in block]
        transformers = sum(isinstance(layer, SpatialTransformer) for layer in layers)

        def resume(h, options):
            options["transformer_index"] += transformers
            return feature

        return resume

    def _shallow(self, unet):
        """Return a copy of the U-Net that runs only the shallow blocks, which it shares. The U-Net itself is not changed."""
        skipped = TimestepEmbedSequential(_Skipped())
        shallow = copy.copy(unet)
        shallow._modules = dict(unet._modules)
        run = self.branch + 1
        shallow.input_blocks = torch.nn.ModuleList([*unet.input_blocks[:run], *[skipped] * (len(unet.input_blocks) - run)])
        shallow.middle_block = skipped
        shallow.output_blocks = torch.nn.ModuleList([*[skipped] * self.first, *unet.output_blocks[self.first :]])
        return shallow

    def _telling(self, unet, position):
        """Return a copy of the U-Net in which `consumed` maps the output of the block that consumes the feature."""
        telling = copy.copy(unet)
        blocks = list(unet.output_blocks)
        told = _Told(lambda h: self._consumed(h, position))
        blocks[self.first] = TimestepEmbedSequential(*blocks[self.first], told)
        telling._modules = {**unet._modules, "output_blocks": torch.nn.ModuleList(blocks)}
        return telling

    def _shallow_control(self, control):
        """Drop the ControlNet residuals of the skipped blocks. For each block the host pops the last entry of a list."""
        if control is None:
            return None
        control = dict(control, middle=[])
        if control.get("input"):
            control["input"] = control["input"][-(self.branch + 1) :]
        if control.get("output"):
            kept = control["output"][: max(0, len(control["output"]) - self.first)]
            control["output"] = kept + [None] * self.first
        return control

    def _is_run(self, block):
        kind, number = block
        return number <= self.branch if kind == "input" else kind == "output" and number >= self.first

    def _without_skipped_patches(self, transformer_options):
        """Return options in which other nodes' block patches are called only for blocks that are run."""
        patches = dict(transformer_options.get("patches", {}))
        for name in ("input_block_patch", "input_block_patch_after_skip"):
            patches[name] = [self._on_run_input(patch) for patch in patches.get(name, [])]
        patches["output_block_patch"] = [self._on_run_output(patch) for patch in patches.get("output_block_patch", [])]
        return {**transformer_options, "patches": patches}

    def _on_run_input(self, patch):
        return lambda h, options: patch(h, options) if self._is_run(options["block"]) else h

    def _on_run_output(self, patch):
        return lambda h, hsp, options: patch(h, hsp, options) if self._is_run(options["block"]) else (h, hsp)
