"""What a quantized MODEL is to the rest of the host: to what saves it, takes its weights, or lays patches on them."""

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

MEASURED = 8  # layers, of which a change's share is found out
LEAST_SHARE = 0.9  # of a change, below which there is a warning
REMEMBERED = 64  # warnings, of as many sets of patches
HOOKS_KEPT = 4  # sets of hooks' patches of a layer, of which is kept what they come to


def quantization_of(model):
    """Return the short name of a MODEL's quantization, None where it has none."""
    return getattr(model.model, "iec_quantization", None)


class _PatchesBeside:
    """A ModelPatcher, but patches on quantized layers go to their branches: LoRAs by their own factors; and what hooks bring
    stands beside the weights, which stay as they are.
    """

    _grown = 0  # bytes that weights have become larger by since the last `load` began

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False, **kwargs):
        """Load the MODEL, as the host does. It decides by what modules take; that some have become larger by their patches when
        they were loaded is no reason to take them for offloaded now, and it is counted afterwards.
        """
        self._grown = 0
        lowvram_model_memory += self._all_growth()
        super().load(device_to, lowvram_model_memory, force_patch_weights, full_load, **kwargs)
        # Where it loads all, the host counts the MODEL as it was made.
        self.model.model_loaded_weight_memory += self._all_growth() if full_load else self._grown + self._left_in_place()

    def _all_growth(self):
        """Return the bytes that patched weights are larger by than those that they were."""
        layers = ((quantized_layer_of(self, key), kept.weight) for key, kept in self.backup.items())
        return sum(layer.weight.nbytes - weight.nbytes for layer, weight in layers if layer is not None)

    def _left_in_place(self):
        """Return the bytes of modules that the host takes for offloaded all the same, though what is patched stays where it is.
        It would lay the patches on these once more.
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
        """Lay the MODEL's patches on a weight, as the host does."""
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
        """Lay hooks' patches on a weight, as the host does."""
        layer, patches = quantized_layer_of(self, key), combined_patches.get(key)
        if layer is None or not patches:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)
        layer.hooked = self._change_by_hooks(layer, key, patches)
        self.model.__dict__.setdefault("iec_hooked", []).append(layer)

    def _change_by_hooks(self, layer, key, patches):
        """Return the Change that hooks' patches make to a layer. It is kept for as long as the run: two groups of hooks may
        take turns in every step.
        """
        known = self.model.__dict__.setdefault("iec_hook_changes", {}).setdefault(key, {})
        is_patched = key in self.backup  # a run lays no other patches on weights
        which = is_patched, *((strength, id(value), *map(str, rest)) for strength, value, *rest in patches)
        if which not in known:
            weight = layer.weight

            def patched():
                unpatched = layer.convert_weight(original_weight(self, key, weight).to(weight.device))
                return with_patches(patches, key, layer.convert_weight(weight), unpatched)

            if len(known) == HOOKS_KEPT:
                known.clear()
            change = layer.changed_by(patches, patched, weight)
            # Whole weights do not stay on a GPU beside those that the host has counted.
            known[which] = change if change.packed is None else change.to(self.offload_device)
        return known[which]

    def unpatch_hooks(self, whitelist_keys_set=None):
        """Take hooks' patches off, as the host does."""
        super().unpatch_hooks(whitelist_keys_set)
        for layer in self.model.__dict__.pop("iec_hooked", ()):
            layer.hooked = None

    def clear_cached_hook_weights(self):
        """Forget what hooks have come to, as the host does at the end of a run."""
        super().clear_cached_hook_weights()
        self.model.__dict__.pop("iec_hook_changes", None)


def quantized_layer_of(model, key):
    """Return the quantized layer whose weight a key of a MODEL is, None where it is another's."""
    name, _, part = key.rpartition(".")
    layer = comfy.utils.get_attr(model.model, name) if part == "weight" else None
    return layer if is_quantized(layer) else None


def patched_packed(model, name, layer):
    """Return the packed weight of a MODEL's quantized layer with the patches that lie on it, int8 [nbytes], on its load device;
    as it was made where there are none.
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
    """Return a MODEL whose network is quantized, with what its patcher, its runs and other nodes need to know of that."""
    if not isinstance(model, _PatchesBeside):
        model.__class__ = _with_patches_beside(type(model))
    # In the host's faster mode it would take hooks off of what it has kept no weights for.
    model.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    model.weight_inplace_update = False  # a weight that is changed is a longer one
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
    """Return the tensors of a BaseModel's network by name, of quantized layers the packed ones."""
    return {key.removeprefix(PREFIX): tensor for key, tensor in base.state_dict().items() if key.startswith(PREFIX)}


def _refuse_saving(*_, **__):
    raise ValueError(
        "model: this MODEL is quantized, and what ComfyUI's own nodes would write of it nothing could open; save it with Save "
        "Quantized Model (IEC)."
    )


def _hand_out(dtype, module, state, prefix, _):
    """Let whoever takes the weights of a network, or of a part of it, have such as can be computed with: a Control-LoRA, or a
    ControlNet that takes over the network's embedders. The host's own count of bytes is over all of the BaseModel.
    """
    if not prefix:
        for name, layer in quantized_layers(module).items():
            state[f"{name}.weight"] = layer.packing.dequantize(state[f"{name}.weight"], dtype)


def _around_loading(executor, model, *args, **kwargs):
    """Refuse patches that quantized layers cannot take, while nothing is patched yet, and warn of those that are lost."""
    check_shapes(model)
    loaded = executor(model, *args, **kwargs)
    with contextlib.suppress(torch.OutOfMemoryError):  # of a sampling run that has room by now, not of a line in the log
        warn_of_lost_changes(model)
    return loaded


def _patches(model):
    """Return {key: patches} of a MODEL, those of its hooks among them."""
    found = {}
    for patches in (model.patches, *model.hook_patches.values()):
        for key, more in patches.items():
            found[key] = [*found.get(key, ()), *more]
    return found


def check_shapes(model):
    """Raise ValueError where a patch on a quantized MODEL enlarges a quantized weight."""
    patches = _patches(model)
    for name, layer in quantized_layers(model.model.diffusion_model).items():
        shape = patched_shape(patches.get(f"{PREFIX}{name}.weight"), layer.packing.shape)
        if shape != tuple(layer.packing.shape):
            raise ValueError(
                f"model: a LoRA enlarges the weight of {name} from {tuple(layer.packing.shape)} to {shape}, which a "
                "quantized layer cannot take up; put the LoRA in front of the node that quantizes, or name that layer in "
                "its exclude."
            )


def warn_of_lost_changes(model):
    """Log a warning, once for the patches that lie on a quantized MODEL, where its weights keep little of what they change; it
    is kept for the reports of runs with these patches (`lost_changes`).
    """
    warnings, key = model.model.__dict__.setdefault("iec_lost_changes", {}), _patches_key(model)
    if key in warnings:
        return
    if len(warnings) >= REMEMBERED:
        warnings.clear()
    warnings[key] = ""  # also where there is no memory to measure it: then no run tries again
    share = kept_share(model)
    if share < LEAST_SHARE:
        warnings[key] = warning = (
            f"Of what LoRAs or other patches on this quantized MODEL change, its weights ({quantization_of(model)}) keep a "
            f"share of {max(share, 0):.2f}, for they are of too high a rank to stand beside the weights, and smaller than "
            "their steps; put the LoRA in front of the node that quantizes."
        )
        logger.warning(f"{warning}")


def lost_changes(base):
    """Return the warning, a sentence, of what is lost of the patches on a MODEL in the run that its BaseModel is in; "" where
    there is none. base: None where it is not known.
    """
    patcher = getattr(base, "current_patcher", None)  # the run's own: other clones, with other patches, have the same base
    return "" if patcher is None else getattr(base, "iec_lost_changes", {}).get(_patches_key(patcher), "")


def _patches_key(model):
    """Return what tells the patches on a MODEL from others. The host gives them a new id when a run's hooks add some, and keeps
    it when these are taken off again.
    """
    return model.patches_uuid, len(model.hook_patches)


def kept_share(model):
    """Return what share of the change that the patches on a quantized MODEL make to its weights these take up: the projection
    of the one on the other, over some layers. 1 where there are no patches. Those of each hook count by themselves.
    """
    asked = kept = 0.0
    for patches in (model.patches, *model.hook_patches.values()):
        for name, layer in _some_patched(model, patches):
            wanted, left = _change_and_what_is_kept(model, name, layer, patches[f"{PREFIX}{name}.weight"])
            asked, kept = asked + wanted.square().sum().item(), kept + (wanted * left).sum().item()
    return kept / asked if asked else 1.0


def _some_patched(model, patches):
    """Return (name, layer) of up to MEASURED of the quantized layers that have patches."""
    found = [one for one in quantized_layers(model.model.diffusion_model).items() if f"{PREFIX}{one[0]}.weight" in patches]
    return found[:: -(-len(found) // MEASURED) or 1]


def _change_and_what_is_kept(model, name, layer, patches):
    """Return what patches change in a layer's weight, and what of it the packed one takes up, float32 as the weight."""
    key = f"{PREFIX}{name}.weight"
    packed = original_weight(model, key, layer.weight).to(model.load_device)
    before = layer.convert_weight(packed)
    patched = with_patches(patches, key, before)
    after = layer.convert_weight(layer.with_change(packed, layer.changed_by(patches, lambda: patched, packed)))
    return patched - before, after - before
