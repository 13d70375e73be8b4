"""A MODEL's original and patched weights, and the fingerprint that identifies the MODEL."""

import math

import comfy.lora
import comfy.weight_adapter
import torch

PLACES, VALUES = 256, 16


def original_weight(model, key, parameter):
    """Return the value of a parameter of `model.model` before the host patched it in place."""
    if key in model.backup:
        return model.backup[key].weight.detach()
    return (model.hook_backup[key][0] if key in model.hook_backup else parameter).detach()


def patched_weight(model, key, weight):
    """Return a weight in floating point with the MODEL's patches for the key; the weight itself if there are none."""
    return with_patches(model.patches.get(key), key, weight)


def with_patches(patches, key, weight, original=None):
    """Return a weight in floating point with a MODEL's patches for this key; the weight itself if there are none.

    original: the weight without any patch, if `weight` is already patched.
    """
    if not patches:
        return weight
    originals = {key: [(weight if original is None else original, None)]}  # in the form in which the host keeps them
    return comfy.lora.calculate_weight(patches, weight.float().clone(), key, original_weights=originals)


def lora_factors(patches, shape, device):
    """Return (out [O, r], into [r, ...]), float32 on a device, whose product a MODEL's patches add to a weight.

    The weight has this shape, [O, ...]. Return None if not all patches are LoRAs that add such a product.
    """
    found = [_factors_of_one(patch, shape, device) for patch in patches]
    if not all(found):
        return None
    return torch.cat([out for out, _ in found], dim=1), torch.cat([into for _, into in found])


def _factors_of_one(patch, shape, device):
    """Return the same as `lora_factors` for one patch, with the scaling of the host's own adapter."""
    strength, adapter, weight_strength, offset, function = patch
    if not isinstance(adapter, comfy.weight_adapter.LoRAAdapter) or weight_strength != 1 or function is not None:
        return None
    out, into, alpha, middle, magnitudes, larger = adapter.weights
    # A LoRA may be for a part of the weight, such as the queries of a qkv layer.
    dimension, start, rows = (0, 0, shape[0]) if offset is None else offset
    out, into = (factor.detach().to(device).flatten(1).float() for factor in (out, into))
    fits = (len(out), out.shape[1], into.shape[1]) == (rows, len(into), math.prod(shape[1:])) and dimension == 0
    if not fits or not len(into) or not all(part is None for part in (middle, magnitudes, larger)):
        return None
    if strength == 0:
        return out.new_zeros(shape[0], 0), into.new_zeros(0, *shape[1:])
    scale = strength if alpha is None else strength * alpha / len(into)
    padded = torch.nn.functional.pad(out * scale, (0, 0, start, shape[0] - start - rows))
    return padded, into.view(-1, *shape[1:])


def patched_shape(patches, shape):
    """Return the shape, a tuple, of a weight of this shape after patching.

    Some LoRAs enlarge weights, for example those that give a network more input channels.
    """
    for _, value, _, offset, *_ in patches or ():
        if isinstance(value, comfy.weight_adapter.LoRAAdapter):
            larger = value.weights[5]
        else:
            pads = isinstance(value, tuple) and value[0] == "diff" and len(value[1]) > 1 and value[1][1].get("pad_weight")
            larger = value[1][0].shape if pads else None
        shape = shape if larger is None or offset is not None else larger
    return tuple(shape)


def fingerprint(model):
    """Return float32 [n <= 4096]: elements of the network's matrices and kernels at fixed places, without LoRAs and hooks.

    The elements of each matrix are normalized to norm 1, so that all matrices count equally. The fingerprints of a network in
    float32, float16 and bfloat16 are equal to about 0.3 %. A quantized network has the fingerprint of its source.
    """
    if getattr(model.model, "iec_fingerprint", None) is not None:
        return model.model.iec_fingerprint
    named = [(name, weight) for name, weight in model.model.diffusion_model.named_parameters() if weight.ndim > 1]
    named.sort(key=lambda item: item[0])
    chosen = [named[number * len(named) // PLACES] for number in range(PLACES)] if len(named) > PLACES else named
    sample = []
    for name, parameter in chosen:
        weight = original_weight(model, f"diffusion_model.{name}", parameter).flatten()
        places = torch.arange(min(VALUES, weight.numel()), device=weight.device) * weight.numel() // VALUES
        values = weight[places].float().cpu()
        sample.append(values / values.norm().clamp(min=1e-12))
    return torch.cat(sample) if sample else torch.zeros(0)


def is_same(one, other):
    """Return whether two fingerprints are of the same model."""
    return one.shape == other.shape and bool((one - other).norm() <= 0.01 * other.norm())
