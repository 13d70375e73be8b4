"""Calibrate quantized weights (GPTQ) on the inputs of their layers in sampling runs."""

import contextlib
import functools
from dataclasses import replace

import comfy.model_management
import torch

from ....iec_core.advice import TRY_PRECISION
from ....iec_core.devices import has_float64
from ....iec_core.log import logger
from ....iec_core.quantization.gptq import Moments, calibrated_weight, sampled_rows, sampled_windows
from ....iec_core.quantization.mixed_precision import LayerChoices
from ....iec_core.quantization.packing import BITS, Packing
from ..sampling.calibration_runs import Bar, watched
from .prediction_errors import evaluations_of, prediction_errors
from .quantize import layers_to_quantize, quantized_layer, weight_shape, weight_to_quantize, with_quantized_layers
from .quantized_network import PREFIX
from .weights import original_weight

POSITIONS = 256  # the most positions per evaluation from which a layer's inputs are taken
WORKSPACE = 6  # rounding a weight takes about this many times the memory of the layer's moments and its float32 weight


def calibrate_weights(model, quantization, runs, memory, budget=None):
    """Return (a quantized MODEL like this one, a summary in words).

    The weights are rounded by GPTQ on sampling runs with the unchanged MODEL. quantization: a Quantization whose weights are
    calibrated. runs: the Runs. memory: about how many bytes of the device's memory this may take. If that is too little for the
    statistics of all layers, the runs are repeated, each time for as many layers as fit. budget: a Budget; each layer then gets
    the bits of `quantization`, or 8 bits, or is not quantized, so that predictions change least within the budget. None: all
    layers get the bits of `quantization`.

    Raises ValueError like `quantize_model`, and if no layer was run, a run had NaN or infinity, or the budget leaves nothing to
    quantize or cannot be met.
    """
    asked = [quantization] if budget is None else [quantization, quantization.with_bits("int8")]
    layers = layers_to_quantize(model, quantization)
    inputs = {name: quantization.packing(weight_shape(model, name, layer)).inputs for name, layer in layers.items()}
    passes = in_passes(inputs, memory)
    choices, first = len(layers) * len(asked), runs.first
    measured = 0 if budget is None else first.steps + evaluations_of(choices, first.steps)
    bar = Bar(len(passes) * runs.steps + choices + measured)
    fitted = _fitted_layers(model, layers, asked, passes, runs, memory, bar)
    _check_seen([first for first, *_ in fitted.values()])
    if budget is None:
        replaced = {layers[name]: first for name, (first,) in fitted.items()}
        return with_quantized_layers(model, quantization, replaced), f"{len(layers)} layers: {quantization.name}"
    errors = prediction_errors(model, fitted, first, bar)
    found = budget.spent([_choices(model, name, layers[name], fitted[name], errors[name]) for name in layers])
    replaced = {layers[name]: fitted[name][choice] for name, choice in found.chosen.items() if choice < len(asked)}
    logger.info(f"{found.verdict()}")
    return with_quantized_layers(model, replace(quantization, mixed=found.bits), replaced), found.table()


def _choices(model, name, layer, fitted, errors):
    """Return the LayerChoices of a layer: its calibrated versions, and the unquantized layer."""
    weight = original_weight(model, f"{PREFIX}{name}.weight", layer.weight)
    words = *(f"{BITS[one.packing.format.kind]} bits" for one in fitted), f"{8 * weight.element_size()} bits"
    nbytes, squares = (one.weight.nbytes for one in fitted), (error.squared for error in errors)
    return LayerChoices(name, weight.numel(), words, (*nbytes, weight.nbytes), (*squares, 0.0))


def _fitted_layers(model, layers, asked, passes, runs, memory, bar):
    """Return {name: [the calibrated layer for each Quantization in `asked`]}. passes: lists of names, one list per pass."""
    if len(passes) > 1:
        logger.info(f"The calibration's runs are done {len(passes)} times, each for a part of the layers.")
    packings = {name: [one.packing(weight_shape(model, name, layer)) for one in asked] for name, layer in layers.items()}
    fitted = {}
    for names in passes:
        with _enough_memory():
            inputs = _Inputs(layers, {name: packings[name][0] for name in names}, memory, _device(model), runs.seed)
        runs.sample(bar, inputs.watching(model))
        inputs.leave_the_device()
        for name in names:
            moments, fitted[name] = inputs.taken(name), []
            for packing, quantization in zip(packings[name], asked):
                comfy.model_management.throw_exception_if_processing_interrupted()
                with _enough_memory():
                    fitted[name].append(_fitted(model, name, layers[name], packing, moments, quantization))
                bar.advance()
    return fitted


def factors_of(model):
    """Return the dtype of the low-rank branches of a MODEL, as WeightFormat names it.

    It is bfloat16 if the weights have that dtype or are computed in it, else float16. float16 is also exact enough for float32
    weights, because the branch holds only the rounding error.
    """
    base = model.model
    return "bfloat16" if torch.bfloat16 in (base.get_dtype(), base.manual_cast_dtype) else "float16"


def in_passes(inputs, memory):
    """Return lists of layer names. The statistics of the layers of one list fit into `memory` bytes together.

    inputs: {name: number of the layer's inputs}, in the network's order.
    """
    passes, taken = [[]], 0
    for name, count in inputs.items():
        more = 4 * count * _block(count, memory)  # bytes of float32 moments of all blocks of the layer
        if passes[-1] and taken + more > memory:
            passes.append([])
            taken = 0
        passes[-1].append(name)
        taken += more
    return passes


def _block(inputs, memory):
    """Return how many of a layer's inputs form one block, so that the layer can be rounded within `memory` bytes."""
    return max(1, min(inputs, memory // (4 * WORKSPACE * inputs)))


def _device(model):
    """Return the device for the statistics and for rounding.

    It is the CPU if the load device has no float64, such as Apple's, because it then also lacks some linear algebra.
    """
    return model.load_device if has_float64(model.load_device) else torch.device("cpu")


@contextlib.contextmanager
def _enough_memory():
    """Raise ValueError, with advice, if the calibration itself runs out of memory."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise ValueError(
            "memory_gb: the device has less free memory than the calibration takes; choose a smaller memory_gb, or close "
            "other programs that use the device."
        ) from error


def _make_room(nbytes, device):
    """Let the host unload models if a device has less free memory than nbytes."""
    comfy.model_management.free_memory(nbytes, device)


class _Inputs:
    """Collects statistics of layer inputs while a MODEL is sampled.

    packings: {name: Packing} of the layers to observe. Memory for the statistics is allocated in the constructor, so that the
    host loads only as much of the MODEL as fits next to it.
    """

    def __init__(self, layers, packings, memory, device, seed):
        self._layers, self._packings = {name: layers[name] for name in packings}, packings
        # One generator per layer, so that its draws do not depend on the pass in which the layer is.
        self._draws = {name: torch.Generator().manual_seed(seed) for name in packings}
        blocks = {name: _block(packing.inputs, memory) for name, packing in packings.items()}
        _make_room(sum(4 * packings[name].inputs * block for name, block in blocks.items()), device)
        self._moments = {name: Moments(packings[name].inputs, block, device) for name, block in blocks.items()}

    def watching(self, model):
        """Return a clone of the MODEL whose runs add the inputs of the layers to the statistics."""

        def watch(transformer_options):
            return [
                layer.register_forward_pre_hook(functools.partial(self._take_up, name)) for name, layer in self._layers.items()
            ]

        return watched(model, watch)

    def leave_the_device(self):
        """Move the statistics to the CPU, which makes room on a GPU for rounding the weights."""
        for moments in self._moments.values():
            moments.to(torch.device("cpu"))

    def taken(self, name):
        """Return the Moments of a layer and remove them here. Raises ValueError if they are not finite."""
        moments = self._moments.pop(name)
        if not moments.is_finite():
            raise ValueError(
                f"model: the input of its layer {name} contains NaN or infinity in a calibration run. {TRY_PRECISION}"
            )
        return moments

    def _take_up(self, name, layer, inputs):
        x, draws = inputs[0].detach(), self._draws[name]
        if isinstance(layer, torch.nn.Conv2d):
            geometry = layer.kernel_size, layer.stride, layer.padding, layer.dilation
            rows = sampled_windows(x, *geometry, POSITIONS, draws)
        else:
            rows = sampled_rows(x, POSITIONS, draws)
        self._moments[name].take_up(self._packings[name].rotated(rows.float()))


def _fitted(model, name, layer, packing, moments, quantization):
    """Return the quantized layer that replaces a layer. A layer that was not run is rounded to nearest."""
    weight = weight_to_quantize(model, name, layer)
    if not moments.count:
        plain = replace(packing.format, calibrated=False, rank=0)
        packing = Packing(packing.shape, plain)
        return quantized_layer(model, name, layer, packing, packing.quantize(weight), quantization)
    device = _device(model)
    _make_room(WORKSPACE * (moments.nbytes + 4 * weight.numel()), device)
    packed = calibrated_weight(weight.to(device), packing, moments.to(device))
    return quantized_layer(model, name, layer, packing, packed, quantization)


def _check_seen(layers):
    """Log which layers were not run. Raises ValueError if no layer was run."""
    missed = [layer.name for layer in layers if not layer.packing.format.calibrated]
    if len(missed) == len(layers):
        raise ValueError(
            "model: none of its layers ran in the calibration. If another node, such as one that compiles, runs copies of "
            "them, put that node after this one. If include names only layers that do not run, name other layers there."
        )
    if missed:
        some = ", ".join(missed[:8]) + (", …" if len(missed) > 8 else "")
        logger.info(f"Layers that did not run are rounded to nearest: {len(missed)} ({some}).")
