"""Measure, in sampling runs, the errors of a quantized MODEL's layers relative to full precision."""

import functools
import math

from ....iec_core.advice import TRY_PRECISION
from ....iec_core.quantization.layer_errors import LayerError, decibels
from ..sampling.calibration_runs import Bar, watched
from .activation_scales import calibrated, scales_of
from .prediction_errors import evaluations_of, prediction_errors
from .quantize import source_of
from .quantized_layers import quantized_layers
from .quantized_network import KEY, PREFIX, patched_packed, quantization_of
from .weights import original_weight, patched_weight


def layer_errors(model, full_precision, runs):
    """Return a list with a LayerError for every quantized layer of a MODEL, measured in Runs with it.

    Each layer's output is compared with that of the full-precision layer for the same input. In a further run of the first
    prompt, the predictions of the full-precision MODEL are compared with those when only this layer is quantized. Raises
    ValueError if the MODEL is not quantized, if `full_precision` is not its source, or if an output is not finite.
    """
    if quantization_of(model) is None:
        raise ValueError("model: this MODEL is not quantized; put Quantize Model (IEC) before this node.")
    source = source_of(model, full_precision)
    layers, device = quantized_layers(model.model.diffusion_model), model.load_device
    references = dict(source.model.diffusion_model.named_modules())
    errors = {name: _of_weight(model, source, name, layer) for name, layer in layers.items()}

    def watch(transformer_options):
        return [
            layer.register_forward_hook(functools.partial(_take_up, errors[name], references[name], device))
            for name, layer in layers.items()
        ]

    watching, first = watched(model, watch), runs.first
    watching.set_additional_models(KEY, [full_precision])
    bar = Bar(runs.steps + first.steps + evaluations_of(len(layers), first.steps))
    runs.sample(bar, watching)
    for name, (error,) in _alone(model, source, layers, first, bar).items():
        errors[name].predicted = error.squared
    return list(errors.values())


def _alone(model, source, layers, run, bar):
    """Return {name: [the PredictionError when only this layer of the full-precision MODEL is quantized]}."""
    network, scales = model.model.diffusion_model, scales_of(model)

    def within(x, timestep, options):
        return calibrated(network, scales, x.device, {**options, "sigmas": timestep})

    return prediction_errors(source, {name: [layer] for name, layer in layers.items()}, run, bar, within)


def _of_weight(model, source, name, layer):
    """Return the LayerError of a layer before any run. Both weights, quantized and full precision, include LoRAs."""
    key, fmt = f"{PREFIX}{name}.weight", layer.packing.format
    original = original_weight(source, key, source.model.get_parameter(key))
    full = patched_weight(source, key, original.float())
    packed = patched_packed(model, name, layer)
    noise = (layer.convert_weight(packed).to(full.device) - full).square().sum().item()
    words = [fmt.kind]
    words += [f"groups of {fmt.group_size}"] if fmt.group_size else []
    words += [f"rotated by {fmt.rotation}"] if fmt.rotation else []
    words += ["GPTQ"] if fmt.calibrated else []
    words += [f"rank {layer.packing.rank(packed)}"] if layer.packing.rank(packed) else []
    return LayerError(
        name, ", ".join(words) + f", activations {layer.activation.bits} bits",
        str(layer.choice(model.load_device)), packed.nbytes, original.nbytes,
        decibels(full.square().sum().item(), noise),
    )  # fmt: skip


def _take_up(error, reference, device, layer, inputs, output):
    error.backend = str(layer.choice(device, inputs[0]))  # depends on whether activations are calibrated
    expected = reference(inputs[0]).float()
    error.signal += expected.square().sum().item()
    error.noise += (output.float() - expected).square().sum().item()
    if not math.isfinite(error.signal + error.noise):
        raise ValueError(
            f"model: the output of its layer {error.name}, quantized or in full precision, contains NaN or infinity in a "
            f"calibration run. {TRY_PRECISION}"
        )
