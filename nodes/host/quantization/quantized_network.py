"""Make a quantized MODEL work with the rest of the host: code that saves it, reads its weights, or patches them."""

import contextlib
import functools

import comfy.hooks
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ....iec_core.log import logger
from .quantized_layers import is_quantized, quantized_layers
from .weights import original_weight, patched_shape, with_patches

KEY = "iec_quantize"
PREFIX = "diffusion_model."

MEASURED = 8  # the most layers on which the kept share of a change is measured
LEAST_SHARE = 0.9  # below this kept share of a change there is a warning
REMEMBERED = 64  # the most sets of patches whose warning is kept
HOOKS_KEPT = 4  # the most sets of hook patches per layer whose Change is kept


def quantization_of(model):
    """Return the short name of a MODEL's quantization, None if it is not quantized."""
    return getattr(model.model, "iec_quantization", None)


class _PatchesBeside:
    """A mixin for a ModelPatcher. It adds the patches of a quantized layer to that layer's low-rank branch; a LoRA keeps its
    own factors.

    Patches of hooks are kept next to the weights, which are not changed.
    """

    _grown = 0  # bytes by which weights have grown since the last `load` began

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):
        """Load the MODEL like the host, and count the memory by which patches enlarge weights.

        The host decides by the size of modules what to offload. Weights that grew by patches when they were loaded must not
        count as offloaded, so the growth is added to the memory limit first, and to the used memory afterwards.
        """
        self._grown = 0
        lowvram_model_memory += self._all_growth()
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
        # After a full load the host counts the size of the MODEL without patches.
        self.model.model_loaded_weight_memory += self._all_growth() if full_load else self._grown + self._left_in_place()

    def _all_growth(self):
        """Return the number of bytes by which all patched weights are larger than the original weights."""
        layers = ((quantized_layer_of(self, key), kept.weight) for key, kept in self.backup.items())
        return sum(layer.weight.nbytes - weight.nbytes for layer, weight in layers if layer is not None)

    def _left_in_place(self):
        """Return the bytes of modules that the host still counts as offloaded, although their patched weights stay loaded.

        Remove the weight functions with which the host would apply the patches to them a second time.
        """
        left = set()
        for key in self.backup:
            name, _, part = key.rpartition(".")
            module, functions = comfy.utils.get_attr(self.model, name), f"{part}_function"
            again = [one for one in getattr(module, functions, ()) if getattr(one, "key", None) == key]
            if again:
                setattr(module, functions, [one for one in getattr(module, functions) if one not in again])
            if hasattr(module, "prev_comfy_cast_weights") and not self.force_cast_weights:
                left.add(module)
        return sum(map(comfy.model_management.module_size, left))

    def patch_weight_to_device(self, key, *args, **kwargs):
        """Apply the MODEL's patches to a weight, like the host."""
        layer = quantized_layer_of(self, key)
        if layer is None:
            return super().patch_weight_to_device(key, *args, **kwargs)
        before, layer.patches = layer.weight.nbytes, self.patches.get(key)
        try:
            return super().patch_weight_to_device(key, *args, **kwargs)
        finally:
            layer.patches = None
            self._grown += layer.weight.nbytes - before

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        """Apply hooks' patches to a weight, like the host."""
        layer, patches = quantized_layer_of(self, key), combined_patches.get(key)
        if layer is None or not patches:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        layer.hooked = self._change_by_hooks(layer, key, patches)
        self.model.__dict__.setdefault("iec_hooked", []).append(layer)

    def _change_by_hooks(self, layer, key, patches):
        """Return the Change that hooks' patches make to a layer.

        It is kept until the run ends, because two groups of hooks may alternate in every step.
        """
        known = self.model.__dict__.setdefault("iec_hook_changes", {}).setdefault(key, {})
        is_patched = key in self.backup  # enough, because the patches on weights are the same within a run
        which = is_patched, *((strength, id(value), *map(str, rest)) for strength, value, *rest in patches)
        if which not in known:
            weight = layer.weight

            def patched():
                unpatched = layer.convert_weight(original_weight(self, key, weight).to(weight.device))
                return with_patches(patches, key, layer.convert_weight(weight), unpatched)

            if len(known) == HOOKS_KEPT:
                known.clear()
            change = layer.changed_by(patches, patched, weight)
            # Whole weights do not stay on the GPU, because the host has not counted them.
            known[which] = change if change.packed is None else change.to(self.offload_device)
        return known[which]

    def unpatch_hooks(self, whitelist_keys_set=None):
        """Remove hooks' patches, like the host."""
        super().unpatch_hooks(whitelist_keys_set)
        for layer in self.model.__dict__.pop("iec_hooked", ()):
            layer.hooked = None

    def clear_cached_hook_weights(self):
        """Forget the Changes of hooks, like the host at the end of a run."""
        super().clear_cached_hook_weights()
        self.model.__dict__.pop("iec_hook_changes", None)


def quantized_layer_of(model, key):
    """Return the quantized layer whose weight has this key in a MODEL, None if the key is of something else."""
    name, _, part = key.rpartition(".")
    layer = comfy.utils.get_attr(model.model, name) if part == "weight" else None
    return layer if is_quantized(layer) else None


def patched_packed(model, name, layer):
    """Return the packed weight of a MODEL's quantized layer with the MODEL's patches, int8 [nbytes], on the load device.

    Without patches return the original packed weight.
    """
    key = f"{PREFIX}{name}.weight"
    packed, patches = original_weight(model, key, layer.weight), model.patches.get(key)
    if not patches:
        return packed
    packed = packed.to(model.load_device)
    change = layer.changed_by(patches, lambda: with_patches(patches, key, layer.convert_weight(packed)), packed)
    return layer.with_change(packed, change)


@functools.cache
def _with_patches_beside(kind):
    return type(kind.__name__, (_PatchesBeside, kind), {})


def mark_quantized(model):
    """Prepare a MODEL with a quantized network for its patcher, its runs and other nodes, and return it."""
    if not isinstance(model, _PatchesBeside):
        model.__class__ = _with_patches_beside(type(model))
    # In the host's faster mode the host would remove hooks from weights that it has not backed up.
    model.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    model.weight_inplace_update = False  # a changed weight is longer
    model.model_options["transformer_options"][KEY] = quantization_of(model)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _around_loading)
    base = model.model
    base.state_dict_for_saving = _refuse_saving
    layers = quantized_layers(base.diffusion_model).values()
    for module in (base.diffusion_model, *base.diffusion_model.children()):
        if module not in layers:
            module._register_state_dict_hook(functools.partial(_hand_out, base.get_dtype()))
    return model


def network_state(base):
    """Return {name: tensor} of a BaseModel's network; quantized layers have their packed weights."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in base.state_dict().items() if key.startswith(PREFIX)}


def _refuse_saving(*_, **__):
    raise ValueError(
        "model: this MODEL is quantized, and ComfyUI's own save nodes would write a file that nothing can open; save it with "
        "Save Quantized Model (IEC)."
    )


def _hand_out(dtype, module, state, prefix, _):
    """Replace the packed weights in a state dict of the network, or of a part of it, by floating-point ones.

    A Control-LoRA needs them, or a ControlNet that takes over the network's embedders. The host counts bytes by the state dict
    of the whole BaseModel, which is not changed.
    """
    if not prefix:
        for name, layer in quantized_layers(module).items():
            state[f"{name}.weight"] = layer.packing.dequantize(state[f"{name}.weight"], dtype)


def _around_loading(executor, model, *args, **kwargs):
    """Refuse patches that quantized layers cannot take, before loading, and warn about lost patches afterwards."""
    check_shapes(model)
    loaded = executor(model, *args, **kwargs)
    with contextlib.suppress(torch.OutOfMemoryError):  # memory is for the sampling run, and a warning must not stop it
        warn_of_lost_changes(model)
    return loaded


def _patches(model):
    """Return {key: patches} of a MODEL, including those of its hooks."""
    found = {}
    for patches in (model.patches, *model.hook_patches.values()):
        for key, more in patches.items():
            found[key] = [*found.get(key, ()), *more]
    return found


def check_shapes(model):
    """Raise ValueError if a patch on a quantized MODEL enlarges a quantized weight."""
    patches = _patches(model)
    for name, layer in quantized_layers(model.model.diffusion_model).items():
        shape = patched_shape(patches.get(f"{PREFIX}{name}.weight"), layer.packing.shape)
        if shape != tuple(layer.packing.shape):
            raise ValueError(
                f"model: a LoRA enlarges the weight of {name} from {tuple(layer.packing.shape)} to {shape}, and a quantized "
                "layer cannot be enlarged; put the LoRA before the node that quantizes, or name that layer in the exclude of "
                "that node."
            )


def warn_of_lost_changes(model):
    """Log a warning if the weights of a quantized MODEL keep little of the change that its patches make.

    It is logged once for each set of patches, and kept for the reports of runs with these patches (`lost_changes`).
    """
    warnings, key = model.model.__dict__.setdefault("iec_lost_changes", {}), _patches_key(model)
    if key in warnings:
        return
    if len(warnings) >= REMEMBERED:
        warnings.clear()
    warnings[key] = ""  # stays if memory is too short to measure: no run tries again
    share = kept_share(model)
    if share < LEAST_SHARE:
        warnings[key] = warning = (
            f"This quantized MODEL ({quantization_of(model)}) keeps a share of {max(share, 0):.2f} of the changes that LoRAs "
            "or other patches make to its weights: their rank is too high for a low-rank branch, and they are smaller than "
            "the rounding steps of the weights; put the LoRA before the node that quantizes."
        )
        logger.warning(f"{warning}")


def lost_changes(base):
    """Return the warning, a sentence, about lost patches on the MODEL that is in a run; "" if there is none.

    base: the MODEL's BaseModel, None if it is not known.
    """
    patcher = getattr(base, "current_patcher", None)  # the run's patcher: other clones with other patches have the same base
    return "" if patcher is None else getattr(base, "iec_lost_changes", {}).get(_patches_key(patcher), "")


def _patches_key(model):
    """Return a key that identifies the patches on a MODEL.

    The id alone is not enough: the host changes it when a run's hooks add patches, and does not restore it when these are
    removed.
    """
    return model.patches_uuid, len(model.hook_patches)


def kept_share(model):
    """Return the share of the patches' change that the weights of a quantized MODEL keep, 1 if there are no patches.

    It is the projection of the kept change on the wanted change, over some layers. Patches of each hook count separately.
    """
    asked = kept = 0.0
    for patches in (model.patches, *model.hook_patches.values()):
        for name, layer in _some_patched(model, patches):
            wanted, left = _change_and_what_is_kept(model, name, layer, patches[f"{PREFIX}{name}.weight"])
            asked, kept = asked + wanted.square().sum().item(), kept + (wanted * left).sum().item()
    return kept / asked if asked else 1.0


def _some_patched(model, patches):
    """Return a list of (name, layer) of at most MEASURED quantized layers that have patches."""
    found = [one for one in quantized_layers(model.model.diffusion_model).items() if f"{PREFIX}{one[0]}.weight" in patches]
    return found[:: -(-len(found) // MEASURED) or 1]


def _change_and_what_is_kept(model, name, layer, patches):
    """Return (the change that patches make to a layer's weight, the change that the packed weight keeps), float32 [O, ...]."""
    key = f"{PREFIX}{name}.weight"
    packed = original_weight(model, key, layer.weight).to(model.load_device)
    before = layer.convert_weight(packed)
    patched = with_patches(patches, key, before)
    after = layer.convert_weight(layer.with_change(packed, layer.changed_by(patches, lambda: patched, packed)))
    return patched - before, after - before
