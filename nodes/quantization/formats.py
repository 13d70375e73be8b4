"""The inputs for the format of a quantized model, shared by the nodes that make one."""

from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.quantization.packing import WeightFormat
from ..host.quantization.quantize import LayerRules, Quantization, parse_patterns
from ..host.quantization.quantized_layers import COMPUTE, EIGHT_BIT, FASTEST, ActivationFormat

MIXED = "mixed"  # weight_bits of a node that chooses the bits of each layer
KINDS = {"8": "int8", "4": "int4", "fp8": "fp8"}
ACTIVATION_BITS = ["8", "16"]
GROUP_SIZES = ["none", "16", "32", "64", "128"]
ACTIVATION_SCALES = ["token", "tensor"]
# Those inputs of `format_inputs` that select the layers and say how they compute.
OF_LAYERS = ("rotate", "activation_scale", "keep_output_projections", "include", "exclude", "compute")


def _wrong_group(group_size, weight_bits, activation_bits):
    """Return the error message for a group size that the bits do not allow, else None."""
    if group_size in (None, "none"):
        return None
    if weight_bits == "fp8":
        return f"group_size: {group_size} works only with integers, and weight_bits is fp8; choose none."
    if weight_bits == "8" and activation_bits == "8":
        return f"group_size: {group_size} works with weight_bits 8 only if activation_bits is 16; choose none."
    return None


def _wrong_compute(compute, activation_bits):
    """Return the error message for a `compute` choice that the bits do not allow, else None."""
    if compute == EIGHT_BIT and activation_bits == "16":
        return f"compute: {compute} works only with activation_bits 8; choose {FASTEST}, or other bits."


def wrong_format(weight_bits, activation_bits, group_size, activation_scale, compute, mixed=False):
    """Return the error message for the first wrong choice, else None. A choice of None is not known yet and counts as right.

    mixed: whether weight_bits may be "mixed".
    """
    wrong = unknown_choice([*KINDS, MIXED] if mixed else list(KINDS), weight_bits=weight_bits)
    wrong = wrong or unknown_choice(ACTIVATION_BITS, activation_bits=activation_bits)
    wrong = wrong or unknown_choice(GROUP_SIZES, group_size=group_size)
    wrong = wrong or unknown_choice(ACTIVATION_SCALES, activation_scale=activation_scale)
    wrong = wrong or unknown_choice(COMPUTE, compute=compute)
    wrong = wrong or _wrong_group(group_size, weight_bits, activation_bits)
    return wrong or _wrong_compute(compute, activation_bits)


def quantization(
    weight_bits, activation_bits, keep_sensitive_layers, group_size="none", rotate=False, activation_scale="token",
    keep_output_projections=False, include="", exclude="", compute=FASTEST, **more,
):  # fmt: skip
    """Return the Quantization that these inputs describe. more: further fields of its WeightFormat.

    Groups of 4-bit weights get two scales if activations have 8 bits, because 8-bit products are summed over whole channels.
    """
    group = 0 if group_size == "none" else int(group_size)
    two_scales = group > 0 and weight_bits == "4" and activation_bits == "8"
    activation = ActivationFormat(int(activation_bits), activation_scale == "tensor", compute)
    rules = LayerRules(keep_sensitive_layers, keep_output_projections, parse_patterns(include), parse_patterns(exclude))
    return Quantization(WeightFormat(KINDS[weight_bits], group, two_scales=two_scales, **more), activation, rules, rotate)


def compute_input(tip):
    """Return the input `compute`: how products with 8-bit activations are computed."""
    return io.Combo.Input("compute", options=list(COMPUTE), default=FASTEST, optional=True, tooltip=tip)


def format_inputs(weight_bits="8", mixed=False):
    """Return {name: io.Input} of the quantization format, for the nodes that make a quantized model.

    weight_bits: the default of that input. mixed: whether "mixed" is one of its choices.
    """
    tip = (
        "8, 4: integers with one scale per output channel, or per group with group_size; with 4, group_size and 8-bit "
        "activations, each weight has one of sixteen unevenly spaced values. fp8: float8 e4m3 with one scale per layer."
    )
    of_mixed = (
        " mixed: each layer gets 4 bits or 8 bits or stays unquantized, depending on its error and the budget. Start with "
        "mixed if you can wait for it."
    )
    inputs = [
        io.Combo.Input(
            "weight_bits",
            options=[*KINDS, MIXED] if mixed else list(KINDS),
            default=weight_bits,
            tooltip=tip + (of_mixed if mixed else " Start with 8."),
        ),
        io.Combo.Input(
            "activation_bits",
            options=ACTIVATION_BITS,
            default="8",
            tooltip="8: activations are quantized while sampling, and products are in 8 bits. 16: activations stay in the "
            "model's compute type; this saves memory, but no time. Start with 8 for speed, 16 for exactness.",
        ),
        io.Boolean.Input(
            "keep_sensitive_layers",
            default=True,
            tooltip="Leave these layers unquantized: the embeddings of timestep and label, the first and the last of the other "
            "layers, and a transformer's final layer. Leave it on: it costs little memory.",
        ),
        io.Combo.Input(
            "group_size",
            options=GROUP_SIZES,
            default="none",
            optional=True,
            tooltip="How many weights share a scale; for 4 bits, or for 8 bits with activation_bits 16. Smaller groups are "
            "more exact and take more memory. none: one scale per output channel. Start with 32 for 4 bits.",
        ),
        io.Boolean.Input(
            "rotate",
            default=False,
            optional=True,
            tooltip="Rotate the inputs of Linear layers by a Hadamard matrix (ConvRot), which spreads outliers. It costs one "
            "more small product per layer. Start with off.",
        ),
        io.Combo.Input(
            "activation_scale",
            options=ACTIVATION_SCALES,
            default="token",
            optional=True,
            tooltip="With activation_bits 8. token: one scale per token or pixel; in larger convolutions one scale per "
            "image. tensor: one scale for the whole tensor. Start with token.",
        ),
        io.Boolean.Input(
            "keep_output_projections",
            default=False,
            optional=True,
            tooltip="Also leave the last layers of attention and of feed-forward networks unquantized, which takes memory. "
            "Start with off.",
        ),
        io.String.Input(
            "include",
            default="",
            optional=True,
            tooltip="Quantize only layers whose name matches one of these, such as input_blocks.*; * is any part of a "
            "name. Empty: all layers.",
        ),
        io.String.Input(
            "exclude",
            default="",
            optional=True,
            tooltip="Do not quantize layers whose name matches one of these, such as *.proj_in middle_block.*; * is any "
            "part of a name. Empty: none.",
        ),
        compute_input(
            "With activation_bits 8. 8-bit: products in 8 bits. dequantized: products in the model's compute type, with "
            "unquantized activations. fastest: on a GPU the faster of the two, timed for each kind of layer at its first "
            "use; on a CPU 8-bit. Start with fastest."
        ),
    ]
    return {one.id: one for one in inputs}
