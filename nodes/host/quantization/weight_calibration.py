"""Quantized weights that are fitted to what comes into their layers in sampling runs."""

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

POSITIONS = 256  # of an evaluation, from which a layer's inputs are taken
WORKSPACE = 6  # times as much memory as a layer's moments, and as its weight in float32, is taken while that is rounded


def calibrate_weights(model, quantization, runs, memory, budget=None):
    """Return (a MODEL like this one with quantized weights that are rounded by GPTQ on sampling runs with the MODEL as it is,
    what they take in words).

    quantization: a Quantization whose weights are calibrated. runs: the Runs. memory: about how many bytes of the device this
    may take; where they are not enough for what is seen of all layers, the runs are repeated, each time for as many as they are
    enough for. budget: a Budget, within which each layer has those bits, 8, or stays as it is, such that the MODEL predicts as
    much alike as it can; None: all have those bits.

    Raises ValueError as `quantize_model`, and where no layer was seen to run, a run had NaN or infinity, or the budget leaves
    nothing to quantize or cannot be met.
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
    """Return the LayerChoices of a layer: what it was fitted to, and as it is."""
    weight = original_weight(model, f"{PREFIX}{name}.weight", layer.weight)
    words = *(f"{BITS[one.packing.format.kind]} bits" for one in fitted), f"{8 * weight.element_size()} bits"
    nbytes, squares = (one.weight.nbytes for one in fitted), (error.squared for error in errors)
    return LayerChoices(name, weight.numel(), words, (*nbytes, weight.nbytes), (*squares, 0.0))


def _fitted_layers(model, layers, asked, passes, runs, memory, bar):
    """Return {name: [the quantized layer of each Quantization that is asked for]}. passes: lists of the names."""
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
    """Return the type of a low-rank branch beside the weights of a MODEL, as WeightFormat has it: bfloat16 beside weights of
    that type or computed in it, else float16, which is exact enough for what rounding has left of float32 too.
    """
    base = model.model
    return "bfloat16" if torch.bfloat16 in (base.get_dtype(), base.manual_cast_dtype) else "float16"


def in_passes(inputs, memory):
    """Return lists of names, each of layers whose inputs can be seen at once in this much memory, in bytes. inputs: {name: how
    many inputs the layer has}, in the network's order.
    """
    passes, taken = [[]], 0
    for name, count in inputs.items():
        more = 4 * count * _block(count, memory)  # float32, of all its blocks
        if passes[-1] and taken + more > memory:
            passes.append([])
            taken = 0
        passes[-1].append(name)
        taken += more
    return passes


def _block(inputs, memory):
    """Return how many of a layer's inputs can be seen together, where it is to be rounded in this much memory, in bytes."""
    return max(1, min(inputs, memory // (4 * WORKSPACE * inputs)))


def _device(model):
    """Return where the sums are and weights are rounded: not on a device such as Apple's, which lacks some of the linear
    algebra as it lacks float64.
    """
    return model.load_device if has_float64(model.load_device) else torch.device("cpu")


@contextlib.contextmanager
def _enough_memory():
    """Tell what to do where memory is short for what the calibration takes itself."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise ValueError(
            "memory_gb: the device has less memory left than the calibration takes; allow less, or close what else uses it."
        ) from error


def _make_room(nbytes, device):
    """Let the host unload models where a device has less than that free."""
    comfy.model_management.free_memory(nbytes, device)


class _Inputs:
    """Sees what comes into layers while a MODEL is sampled. packings: {name: Packing} of the layers that are seen; its memory
    is taken now, so that the host loads no more of the MODEL than there is room for.
    """

    def __init__(self, layers, packings, memory, device, seed):
        self._layers, self._packings = {name: layers[name] for name in packings}, packings
        # One for each layer, so that its draws are the same in whatever pass it is.
        self._draws = {name: torch.Generator().manual_seed(seed) for name in packings}
        blocks = {name: _block(packing.inputs, memory) for name, packing in packings.items()}
        _make_room(sum(4 * packings[name].inputs * block for name, block in blocks.items()), device)
        self._moments = {name: Moments(packings[name].inputs, block, device) for name, block in blocks.items()}

    def watching(self, model):
        """Return a clone of the MODEL in whose runs what comes into the layers is taken up."""

        def watch(transformer_options):
            return [
                layer.register_forward_pre_hook(functools.partial(self._take_up, name)) for name, layer in self._layers.items()
            ]

        return watched(model, watch)

    def leave_the_device(self):
        """Bring what was seen to the CPU, which makes room on a GPU for what rounds the weights."""
        for moments in self._moments.values():
            moments.to(torch.device("cpu"))

    def taken(self, name):
        """Return the Moments of a layer, which are gone then. Raises ValueError where they are not finite."""
        moments = self._moments.pop(name)
        if not moments.is_finite():
            raise ValueError(
                f"model: NaN or infinity came into its layer {name} in a calibration run, from which nothing can be found out. "
                f"{TRY_PRECISION}"
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
    """Return the quantized layer in place of one; of one that was not run, rounded to the nearest."""
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
    """Tell of layers that were not run; raises ValueError where none was."""
    missed = [layer.name for layer in layers if not layer.packing.format.calibrated]
    if len(missed) == len(layers):
        raise ValueError(
            "model: nothing was seen to enter its layers; another node runs copies of them, as one that compiles does, or "
            "include names only some that do not run: put that node behind this one, or include others."
        )
    if missed:
        some = ", ".join(missed[:8]) + (", …" if len(missed) > 8 else "")
        logger.info(f"Layers that did not run are rounded to the nearest: {len(missed)} ({some}).")
