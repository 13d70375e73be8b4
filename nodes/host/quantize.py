"""Quantized evaluation of a MODEL: its Linear and Conv2d layers compute in integers while the model is evaluated.

The weights stay the host's, so that whatever the host does to them (LoRA before or after, weight hooks, offloading,
unloading) reaches the quantized layers too. A layer's quantized weight is kept until the sampling run ends, unless the
layer is offloaded or weight hooks are at work. What is replaced, and for the duration of an evaluation only, is the method
by which the host's layers compute with weights that need work before use: whatever else wraps a layer stays in place.
"""

import contextlib
import functools

import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ...iec_core.quantization import conv2d_int8, linear_int8, quantize_weight
from .runs import keep_for_run

KEY = "iec_quantize"

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Modules that embed the timestep and the label, as the host's networks name them.
EMBEDDINGS = (
    "time_embed",
    "label_emb",
    "time_in",
    "vector_in",
    "guidance_in",
    "t_embedder",
    "y_embedder",
    "time_embedding",
    "time_projection",
    "time_proj",
    "timestep_embedder",
    "time_text_embed",
)


def _is_supported(layer):
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or weight is None:
        return False
    if weight.dtype not in FLOATS or type(weight.data) is not torch.Tensor:
        return False  # quantized already, by the host
    if isinstance(layer, torch.nn.Linear):
        return True
    plain = isinstance(layer, torch.nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and not isinstance(layer.padding, str)


def quantizable_layers(network, keep_sensitive):
    """Return {name: layer} of the Linear and Conv2d layers to quantize.

    With keep_sensitive, the embeddings of timestep and label are left out, then the first and the last of the other layers
    (in a U-Net the first and the last convolution), and a transformer's final layer.
    """
    layers = {name: layer for name, layer in network.named_modules() if _is_supported(layer)}
    if not keep_sensitive:
        return layers
    layers = {name: layer for name, layer in layers.items() if not set(EMBEDDINGS) & set(name.split("."))}
    return {name: layers[name] for name in list(layers)[1:-1] if not name.startswith("final_layer.")}


def short_name(weight_bits, activation_bits, keep_sensitive):
    """Return the field's short name of a quantization, such as W8A8, with a word more where it is of all layers."""
    return f"W{weight_bits}A{activation_bits}" + ("" if keep_sensitive else " of all layers")


class QuantizedRun:
    """The integer weights of one sampling run, and the forward passes that use them. name: see `short_name`."""

    def __init__(self, weight_bits, activation_bits, name):
        self.name = name
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.weights = {}
        self._is_paused = False

    @contextlib.contextmanager
    def paused(self):
        """Within this, the network is evaluated in full precision."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def clear(self):
        """Forget the weights."""
        self.weights.clear()

    def forward(self, layer, reusable, x):
        """Evaluate `layer` on x; with `reusable`, the weight is known to stay as it is for the whole run."""
        if self._is_paused:
            return type(layer).forward_comfy_cast_weights(layer, x)
        ready = self.weights.get(layer) if reusable else None
        if ready is not None:
            return self._compute(layer, x, *ready)
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)
        quantized = quantize_weight(weight, self.weight_bits)
        if self.activation_bits == 16:
            quantized = quantized.dequantize(x.dtype)
        if reusable and layer.weight.device == x.device:  # an offloaded layer must not stay on the device
            self.weights[layer] = quantized, bias
        out = self._compute(layer, x, quantized, bias)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return out

    def _compute(self, layer, x, weight, bias):
        if isinstance(layer, torch.nn.Linear):
            return (linear_int8 if self.activation_bits == 8 else torch.nn.functional.linear)(x, weight, bias)
        convolve = conv2d_int8 if self.activation_bits == 8 else torch.nn.functional.conv2d
        return convolve(x, weight, bias, layer.stride, layer.padding, layer.dilation)


@contextlib.contextmanager
def _forwards(replacements):
    """Let every layer of {layer: forward} compute by its replacement, and as before afterwards, whatever happens."""
    names = ("comfy_cast_weights", "forward_comfy_cast_weights")
    before = [(layer, {name: layer.__dict__[name] for name in names if name in layer.__dict__}) for layer in replacements]
    try:
        for layer, forward in replacements.items():
            layer.__dict__.update(zip(names, (True, forward)))
        yield
    finally:
        for layer, attributes in before:
            for name in names:
                layer.__dict__.pop(name, None)
            layer.__dict__.update(attributes)


def apply_quantization(model, weight_bits, activation_bits, keep_sensitive):
    """Return a clone of a MODEL whose network is evaluated with weights of `weight_bits` (8, 4) and activations of
    `activation_bits` (8: integers with dynamic scales; 16: left in the model's compute dtype).

    Raises ValueError where the MODEL has no layer to quantize, or is quantized already.
    """
    if not quantizable_layers(model.get_model_object("diffusion_model"), keep_sensitive):
        raise ValueError("model: this MODEL has no Linear or Conv2d layer in floating point to quantize.")
    if model.get_wrappers(WrappersMP.APPLY_MODEL, KEY):
        raise ValueError("model: this MODEL is quantized already; use one IECQuantizeModel node only.")

    def apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        run = transformer_options[KEY]
        base = executor.class_obj
        reusable = base.current_patcher.current_hooks is None  # weight hooks change weights between steps
        layers = quantizable_layers(base.diffusion_model, keep_sensitive).values()
        with _forwards({layer: functools.partial(run.forward, layer, reusable) for layer in layers}):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    name = apply_model.quantization = short_name(weight_bits, activation_bits, keep_sensitive)
    model = model.clone()
    model.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE, KEY, keep_for_run(KEY, lambda: QuantizedRun(weight_bits, activation_bits, name))
    )
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply_model)
    return model


def quantization_of(model):
    """Return the short name of a MODEL's quantization, None where it has none."""
    return next((wrapper.quantization for wrapper in model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)), None)
