"""Convert a built-in model's Linear layers to other 4-bit formats: comfy-kitchen's, as in ComfyUI 0.33, and torchao's.

Each format rounds the weights by its own method.
"""

import copy
import logging

import torch


class NotThere(Exception):
    """Something to compare with is not on this machine; the message says why."""


logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # its portable kernels warn about every product


class _InFormat(torch.nn.Module):
    """A Linear layer whose weight is a comfy-kitchen QuantizedTensor. of_inputs: whether the input is quantized to its layout
    too.
    """

    def __init__(self, layer, layout, of_inputs, **settings):
        super().__init__()
        from comfy_kitchen.tensor import QuantizedTensor

        self._made, self._layout, self._of_inputs = QuantizedTensor.from_float, layout, of_inputs
        # Neither tensor is a parameter: the host must not move or cast them.
        self._quantized, self._bias = [self._made(layer.weight.data, layout, **settings)], [layer.bias]

    @property
    def nbytes(self):
        parts = self._quantized[0].state_dict().values()
        return sum(part.nbytes for part in parts) + (0 if self._bias[0] is None else self._bias[0].nbytes)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        rows = self._made(rows, self._layout) if self._of_inputs else rows
        out = torch.nn.functional.linear(rows, self._quantized[0], self._bias[0])
        return out.view(*x.shape[:-1], -1)


class _InTorchao(torch.nn.Module):
    """A Linear layer in torchao's int4 in groups, with activations of 8 bits."""

    def __init__(self, layer, group_size):
        super().__init__()
        try:
            from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup, quantize_
        except ImportError as error:
            raise NotThere("torchao is not installed") from error
        plain = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.load_state_dict(layer.state_dict())
        weights = {"weight_dtype": torch.int4, "weight_granularity": PerGroup(group_size)}
        quantize_(whole := torch.nn.Sequential(plain), Int8DynamicActivationIntxWeightConfig(**weights))
        self._layer = [whole]
        # torchao's packed form is for other processors; counted as 4 bits, and a float32 scale per group.
        of_bias = 0 if layer.bias is None else layer.bias.nbytes
        self.nbytes = layer.weight.numel() // 2 + 4 * layer.weight.numel() // group_size + of_bias

    def forward(self, x):
        return self._layer[0](x)


def _rotation(layer):
    return next(size for size in (256, 64) if layer.in_features % size == 0)


def _two_scales(layer):
    return _InFormat(layer, "AsymW4A8Int8Layout", False, group_size=16, convrot_groupsize=_rotation(layer))


def _four_and_four(layer):
    return _InFormat(layer, "TensorCoreConvRotW4A4Layout", False, convrot_groupsize=_rotation(layer))


OTHERS = {
    "the host's asym_w4a8_int8, groups of 16": _two_scales,
    "the host's convrot_w4a4, activations of 4 bits": _four_and_four,
    "the host's nvfp4, activations too": lambda layer: _InFormat(layer, "TensorCoreNVFP4Layout", True),
    "torchao's int4 in groups of 32, activations of 8 bits": lambda layer: _InTorchao(layer, 32),
}


def in_other_format(nodes, full, name):
    """Return (a MODEL like `full` whose layers are in one of OTHERS, the bytes of the weights that the host does not count).

    The layers are the ones that Quantize Model would convert. A layer whose input width is not a multiple of 64 is left
    unchanged, because these formats do not support it. Raises NotThere, also if some of the layers are not Linear.
    """
    if full.load_device.type != "cpu":
        raise NotThere("it is compared on a CPU alone")
    like = nodes["IECQuantizeModel"].execute(
        model=full, weight_bits="8", activation_bits="16", keep_sensitive_layers=True
    ).result[0]  # fmt: skip
    network, source = like.model.diffusion_model, full.model.diffusion_model
    chosen = [key for key, layer in network.named_modules() if hasattr(layer, "packing")]
    if not all(isinstance(source.get_submodule(key), torch.nn.Linear) for key in chosen):
        raise NotThere("it is for Linear layers alone")
    nbytes = 0
    for key in chosen:
        owner, _, attribute = key.rpartition(".")
        layer = copy.deepcopy(source.get_submodule(key))
        if layer.in_features % 64 == 0:
            layer = OTHERS[name](layer)
            nbytes += layer.nbytes
        setattr(network.get_submodule(owner), attribute, layer)
    return like, nbytes
