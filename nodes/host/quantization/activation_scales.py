"""Calibrate the activation scales of a quantized MODEL on sampling runs, and make a MODEL that uses them."""

import contextlib
import functools
import weakref

import torch
from comfy.patcher_extension import WrappersMP

from ....iec_core.quantization.activation_scales import ActivationScales, ScaleStatistics
from ..sampling.calibration_runs import Bar, watched
from ..sampling.run_plan import place
from .quantized_layers import quantized_layers
from .quantized_network import quantization_of
from .weights import fingerprint, is_same

KEY = "iec_activation_scales"
_layers = weakref.WeakKeyDictionary()  # {network: (reference to a run's sigmas, references to its quantized layers)}


def calibrate_activations(model, runs, timestep_wise, search):
    """Return the ActivationScales of a quantized MODEL, from Runs with it. Scales that the MODEL already has are ignored.

    timestep_wise: whether each step gets its own scales. search: whether to search for the scales of least squared error; all
    runs are then done twice.

    Raises ValueError if the MODEL has no quantized activations.
    """
    _check(model)
    model = _without_scales(model)
    layers = quantized_layers(model.model.diffusion_model)
    sample = functools.partial(runs.sample, Bar((1 + search) * runs.steps))
    found = _Observed(layers, timestep_wise)
    sample(found.observing(model, "largest"))
    if search:
        sample(found.observing(model, "search"))
    names, sigmas, table = found.scales(search)
    facts = {
        "quantization": quantization_of(model), "scales": "timestep-wise" if timestep_wise else "static",
        "scale": "search" if search else "absmax", "prompts": len(runs.prompts), "runs": runs.count, **runs.sampling,
    }  # fmt: skip
    facts = {name: str(value) for name, value in facts.items()}
    return ActivationScales(facts, fingerprint(model), names, sigmas, table)


def apply_scales(model, scales):
    """Return a clone of a quantized MODEL with calibrated activation scales, instead of scales that it already has.

    Raises ValueError if the scales are for another model or another quantization.
    """
    _check(model)
    if not is_same(fingerprint(model), scales.fingerprint):
        raise ValueError("profile: it was calibrated for another model; calibrate for this model, or load its profile.")
    layers = quantized_layers(model.model.diffusion_model)
    if scales.facts["quantization"] != quantization_of(model):
        raise ValueError(
            f"profile: it was calibrated with quantization {scales.facts['quantization']}, but this MODEL has quantization "
            f"{quantization_of(model)}; quantize the MODEL as in the calibration, or calibrate again."
        )
    if missing := sorted(set(scales.names) - set(layers)):
        raise ValueError(
            f"profile: it has a scale for {missing[0]}, which is not quantized in this MODEL; quantize the MODEL as in the "
            "calibration, or calibrate again."
        )

    def apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        with calibrated(executor.class_obj.diffusion_model, scales, x.device, transformer_options):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    apply_model.scales = scales  # not an attachment: the host reloads a clone that has other attachments
    model = _without_scales(model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
    return model


def _without_scales(model):
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    return model


def scales_of(model):
    """Return the ActivationScales of a MODEL, None if it has none."""
    return next((wrapper.scales for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)), None)


@contextlib.contextmanager
def calibrated(network, scales, device, transformer_options):
    """Set the scales of a quantized network's layers for one evaluation, and remove them at the end.

    scales: ActivationScales, or None to do nothing. device: where the evaluation takes place. transformer_options: the host's,
    for this evaluation.
    """
    layers = [] if scales is None else _layers_of(network, transformer_options.get("sample_sigmas"))
    try:
        if scales is not None:
            found = dict(zip(scales.names, scales.at(transformer_options["sigmas"].flatten()[0].to(device)).unbind()))
            for layer in layers:  # not by the module's own __setattr__, which takes ten times as long
                layer.__dict__["input_scale"] = found.get(layer.name)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("input_scale", None)


def _layers_of(network, sigmas):
    """Return a list of a network's quantized layers.

    The search takes milliseconds, so it is done once per run. It must be repeated for each run, because between runs the host
    may put other modules into a network by object patches. sigmas: the tensor that the host made for the run, None if there is
    none.
    """
    run, found = _layers.get(network, (lambda: None, ()))
    if sigmas is None or run() is not sigmas:
        found = [weakref.ref(layer) for layer in quantized_layers(network).values()]
        if sigmas is not None:
            _layers[network] = weakref.ref(sigmas), found
    return [layer for one in found if (layer := one()) is not None]


def _check(model):
    layers = quantized_layers(model.model.diffusion_model).values()
    if not any(layer.activation.bits == 8 for layer in layers):
        raise ValueError(
            "model: its activations are not quantized; put Quantize Model (IEC) with activation_bits 8 before this node."
        )


class _Observed:
    """Collects statistics of the inputs of quantized layers while a MODEL is sampled."""

    def __init__(self, layers, timestep_wise):
        self._layers, self._timestep_wise = layers, timestep_wise
        self._statistics = self._sigmas = None

    def observing(self, model, what):
        """Return a clone of the MODEL. Its runs add the inputs of the layers to the statistics, by the method named `what`."""

        def watch(transformer_options):
            if not self._locate(transformer_options):
                return []
            return [
                layer.register_forward_pre_hook(functools.partial(self._take_up, getattr(self._statistics, what), name))
                for name, layer in self._layers.items()
            ]

        return watched(model, watch)

    def scales(self, searched):
        """Return (names, sigmas float64 [S], scales float32 [S, L]) in the form of ActivationScales.

        Raises ValueError if no layer was evaluated.
        """
        names, scales = self._statistics.scales(searched)
        if not names:
            raise ValueError(
                "model: none of its quantized layers ran in the calibration; another node, such as one that compiles, runs "
                "copies of them: put that node after this one."
            )
        if len(scales) == 1:
            return names, self._sigmas[:1], scales
        # A scheduler with fewer timesteps than steps returns equal sigmas. The statistics are then at the last of them.
        last = torch.cat([self._sigmas[1:] < self._sigmas[:-1], torch.tensor([True])])
        return names, self._sigmas[last], scales[last]

    def _locate(self, transformer_options):
        """Set the step of the statistics to that of an evaluation. Return whether this step is known."""
        told = place(transformer_options)
        if told is None:
            return False
        sigmas, step = told["schedule"].sigmas, told["step"]
        if self._statistics is None:
            kinds = {name: "fp8" if layer.packing.format.kind == "fp8" else "int8" for name, layer in self._layers.items()}
            self._statistics = ScaleStatistics(kinds, len(sigmas) - 1, self._timestep_wise)
            self._sigmas = torch.tensor(sigmas[:-1], dtype=torch.float64)
        while step + 2 < len(sigmas) and sigmas[step + 1] == sigmas[step]:
            step += 1
        self._statistics.step = step
        return True

    @staticmethod
    def _take_up(take_up, name, layer, inputs):
        take_up(name, layer.rotated(inputs[0].float()))
