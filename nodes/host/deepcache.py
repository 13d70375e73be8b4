"""DeepCache on the host's U-Nets, through its hooks: no copy of the forward pass, no block replaced in the model.

Branch b runs the b + 1 outermost skip connections: input blocks 0..b and the last b + 1 output blocks. The feature that
enters the first of these output blocks is what a full evaluation keeps and a cached one takes up again. A cached
evaluation is the host's own forward pass over a shallow copy of the U-Net, in which the other blocks pass on a tensor
of no channels, at no cost.
"""

import copy
import math
from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ...iec_core.caching import CacheSchedule, FeatureCache
from .runs import keep_for_run
from .steps import Schedule

KEY = "iec_deepcache"

# What the correction of a full step does: refresh the features (in the authors' code), leave those of the step's own
# evaluation (keep), or take these up and be evaluated over the shallow blocks alone (reuse).
CORRECTION_PASSES = ("refresh", "keep", "reuse")


class _Skipped(torch.nn.Module):
    """A block that is not run: passes on no channels, so that what the host concatenates stays empty."""

    def forward(self, x):
        return x[:, :0]


UNIFORM = CacheSchedule("uniform")


@dataclass(frozen=True)
class CacheSettings:
    """interval, branch: DeepCache's. schedule: a CacheSchedule. start, end: sigmas between which (start inclusive, end
    exclusive) steps are cached. forecast: one of iec_core.caching.FORECASTS. correction_pass: one of CORRECTION_PASSES.
    """

    interval: int
    branch: int
    schedule: CacheSchedule = UNIFORM
    start: float = math.inf
    end: float = -math.inf
    forecast: str = "hold"
    correction_pass: str = "refresh"

    def full_steps(self, sigmas):
        """Return the frozenset of the steps that are evaluated in full over a schedule of n + 1 sigmas."""
        full = self.schedule.full_steps(max(len(sigmas) - 1, 1), self.interval)
        outside = {step for step, sigma in enumerate(sigmas[:-1]) if not self.start >= sigma > self.end}
        return full | outside


class DeepCache:
    """One sampling run's cache: `forward` decides for each evaluation whether it is full or cached."""

    def __init__(self, unet, settings):
        self.settings = settings
        self.branch = settings.branch
        self.first = len(unet.output_blocks) - 1 - settings.branch  # the first output block that a cached evaluation runs
        self.features = FeatureCache(settings.forecast)
        self._schedule = self._full = None

    def clear(self):
        """Forget the features."""
        self.features.clear()

    def _locate(self, transformer_options):
        """Return (whether the evaluation's step is a full one, its position on the schedule)."""
        if self._schedule is None:
            self._schedule = Schedule(transformer_options)
            self._full = self.settings.full_steps(self._schedule.sigmas)
        step, position = self._schedule.locate(transformer_options)
        return step in self._full, position

    def forward(self, executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        """Evaluate the U-Net in full, keeping the deep feature, or over the shallow blocks with the kept one."""
        keys = _entry_keys(x, transformer_options)
        is_correction = transformer_options.get("iec", {}).get("iteration", 0) > 0
        is_full, position = self._locate(transformer_options)
        feature = None
        if not is_full or (is_correction and self.settings.correction_pass == "reuse"):
            feature = self.features.load(keys, x.shape[0], position)
        if feature is None:
            if is_correction and self.settings.correction_pass == "keep":
                return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
            options = self._at_feature(transformer_options, lambda h, options: self._keep(keys, h, position))
            return executor(x, timesteps, context, y, control, options, **kwargs)

        shallow = self._shallow(executor.class_obj)
        options = self._without_skipped_patches(transformer_options)
        options = self._at_feature(options, lambda h, options: self._resume(feature, executor.class_obj, options))
        inner = WrapperExecutor.new_class_executor(shallow._forward, shallow, executor.wrappers, executor.idx + 1)
        return inner.execute(x, timesteps, context, y, self._shallow_control(control), options, **kwargs)

    def _at_feature(self, transformer_options, replace):
        """Return the options with h -> replace(h, options) applied to what enters the first shallow output block, before
        any other patch, so that the others see what they would see without the cache.
        """

        def patch(h, hsp, options):
            return replace(h, options) if options["block"] == ("output", self.first) else h, hsp

        patches = transformer_options.get("patches", {})
        patches = {**patches, "output_block_patch": [patch, *patches.get("output_block_patch", [])]}
        return {**transformer_options, "patches": patches}

    def _keep(self, keys, h, position):
        self.features.store(keys, h, position)
        return h

    def _resume(self, feature, unet, options):
        """Go on with the kept feature, the host's running number of the transformer counted past the skipped blocks."""
        skipped = [*unet.input_blocks[self.branch + 1 :], unet.middle_block, *unet.output_blocks[: self.first]]
        layers = [layer for block in skipped if block is not None for layer in block]
        options["transformer_index"] += sum(isinstance(layer, SpatialTransformer) for layer in layers)
        return feature

    def _shallow(self, unet):
        """Return a copy of the U-Net that shares the blocks which are run; the U-Net itself stays as it is."""
        skipped = TimestepEmbedSequential(_Skipped())
        shallow = copy.copy(unet)
        shallow._modules = dict(unet._modules)
        run = self.branch + 1
        shallow.input_blocks = torch.nn.ModuleList([*unet.input_blocks[:run], *[skipped] * (len(unet.input_blocks) - run)])
        shallow.middle_block = skipped
        shallow.output_blocks = torch.nn.ModuleList([*[skipped] * self.first, *unet.output_blocks[self.first :]])
        return shallow

    def _shallow_control(self, control):
        """Drop the ControlNet residuals of the skipped blocks. The host pops a list's last entry for its next block."""
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
        """Keep other nodes' block patches from being called for blocks that are not run."""
        patches = dict(transformer_options.get("patches", {}))
        for name in ("input_block_patch", "input_block_patch_after_skip"):
            patches[name] = [self._on_run_input(patch) for patch in patches.get(name, [])]
        patches["output_block_patch"] = [self._on_run_output(patch) for patch in patches.get("output_block_patch", [])]
        patches.pop("middle_block_after_patch", None)
        return {**transformer_options, "patches": patches}

    def _on_run_input(self, patch):
        return lambda h, options: patch(h, options) if self._is_run(options["block"]) else h

    def _on_run_output(self, patch):
        return lambda h, hsp, options: patch(h, hsp, options) if self._is_run(options["block"]) else (h, hsp)


def _entry_keys(x, transformer_options):
    """Return a key for each conditioning entry in the batch: equal keys mean that one's feature can serve the other.

    Besides the entry, as the host numbers it, that takes the shape, the context window if there is one, and which blocks
    are patched: perturbed-attention guidance evaluates an entry twice, once with a replaced attention.
    """
    replaced = transformer_options.get("patches_replace", {})
    patched = frozenset((kind, block) for kind, blocks in replaced.items() for block in blocks)
    window = getattr(transformer_options.get("context_window"), "index_list", ())
    place = (tuple(x.shape[1:]), tuple(window), patched)
    return [(*entry, *place) for entry in zip(transformer_options["cond_or_uncond"], transformer_options["uuids"])]


def apply_deepcache(model, settings):
    """Return a clone of a U-Net MODEL that evaluates its deep blocks on full steps only, as CacheSettings say.

    Raises ValueError where the MODEL is no U-Net, has no such branch, or has a DeepCache already.
    """
    unet = model.get_model_object("diffusion_model")
    if not isinstance(unet, UNetModel):
        raise ValueError(
            f"model: IECDeepCache needs a U-Net such as those of SD 1.5 or SDXL, and this MODEL is a {type(unet).__name__}."
        )
    blocks = len(unet.output_blocks)
    if not 0 <= settings.branch < blocks:
        raise ValueError(f"branch: this U-Net has branches 0 to {blocks - 1}, and {settings.branch} is none of them.")
    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        raise ValueError("model: this MODEL has a DeepCache already; use one IECDeepCache node only.")

    def forward(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        run = transformer_options[KEY]
        return run.forward(executor, x, timesteps, context, y, control, transformer_options, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, keep_for_run(KEY, lambda: DeepCache(unet, settings)))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, forward)
    return model
