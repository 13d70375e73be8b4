"""IECQuantizeModel on the host's network."""

import sys

import pytest
import torch


@pytest.fixture
def quantized(host, model):
    def make(weight_bits=8, activation_bits=8, source=None, keep_sensitive_layers=True):
        return host.run(
            "IECQuantizeModel", model=source or model, weight_bits=str(weight_bits), activation_bits=str(activation_bits),
            keep_sensitive_layers=keep_sensitive_layers,
        )[0]  # fmt: skip

    return make


def evaluated_layers(model, run):
    """Return {name: (layer, input, output)} of the first call of every Linear and Conv2d while run() runs."""
    seen, hooks = {}, []
    for name, layer in model.model.diffusion_model.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):

            def note(layer, inputs, output, name=name):
                seen.setdefault(name, (layer, inputs[0].clone(), output.clone()))

            hooks.append(layer.register_forward_hook(note))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def symmetric(x, limit):
    """Quantize the rows of x [R, C] in float32, as the format defines it: (int64, scale float64)."""
    scale = x.abs().amax(1) / limit
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale[:, None]).round().long(), scale.double()


def reference(layer, x, weight_bits, activation_bits):
    """The layer's output by its definition: int64 sums, then float64 scales."""
    weight, weight_scale = symmetric(layer.weight.flatten(1), 2 ** (weight_bits - 1) - 1)
    weight = weight.reshape(layer.weight.shape)
    is_conv = isinstance(layer, torch.nn.Conv2d)
    if activation_bits == 16:
        values, scale = x.double(), torch.ones(1)
    elif is_conv:
        values, scale = symmetric(x.flatten(1), 127)
        values, scale = values.reshape(x.shape), scale[:, None, None, None]
    else:
        values, scale = symmetric(x.reshape(-1, x.shape[-1]), 127)
        values, scale = values.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
    if is_conv:  # float64 holds these sums exactly
        sums = torch.nn.functional.conv2d(values.double(), weight.double(), None, layer.stride, layer.padding)
        return sums * scale * weight_scale[:, None, None] + (0 if layer.bias is None else layer.bias[:, None, None])
    return (values.double() @ weight.double().t()) * scale * weight_scale + (0 if layer.bias is None else layer.bias)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (8, 16), (4, 16)])
def test_every_layer_computes_by_the_definition(model, sample, quantized, weight_bits, activation_bits):
    variant = quantized(weight_bits, activation_bits)
    layers = evaluated_layers(model, lambda: sample(variant, steps=1))
    plain = {name for name in layers if name.split(".")[0] in ("time_embed", "label_emb")} | {"input_blocks.0.0", "out.2"}
    assert len(layers) > 60 and plain < set(layers)
    for name, (layer, x, output) in layers.items():
        if name in plain:
            assert torch.equal(output, layer(x)), name
            continue
        expected = reference(layer, x, weight_bits, activation_bits)
        assert (output.double() - expected).abs().max() <= 3e-6 * expected.abs().max(), name
        assert not torch.equal(output, layer(x)), name


def test_integer_sums_of_every_layer_equal_int64_bit_for_bit(model, sample, quantized, monkeypatch):
    """What the integer kernels are given and give in a real run, before any scale is applied."""
    core = sys.modules[next(name for name in sys.modules if name.endswith(".iec_core.quantization"))]
    int_matmul, conv2d_sums, seen = core.int_matmul, core.conv2d_sums, []

    def matmul(a, b):
        result = int_matmul(a, b)
        assert torch.equal(result.long(), a.long() @ b.long().t())
        seen.append("matmul")
        return result

    def convolve(x, w, stride, padding, dilation):
        result = conv2d_sums(x, w, stride, padding, dilation)
        exact = torch.nn.functional.conv2d(x.double(), w.double(), None, stride, padding, dilation)  # below 2^53
        assert torch.equal(result.long(), exact.long())
        seen.append("convolution")
        return result

    monkeypatch.setattr(core, "int_matmul", matmul)
    monkeypatch.setattr(core, "conv2d_sums", convolve)
    sample(quantized(), steps=1)
    layers = model.model.diffusion_model.named_modules()
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for _, layer in layers) - 2
    assert seen.count("convolution") == convolutions > 20
    assert seen.count("matmul") > convolutions


def test_sensitive_layers_can_be_quantized_too(model, sample, quantized):
    layers = evaluated_layers(model, lambda: sample(quantized(keep_sensitive_layers=False), steps=1))
    assert all(not torch.equal(output, layer(x)) for layer, x, output in layers.values())


def test_fewer_bits_cost_more_error(sample, model, quantized, relative):
    expected = sample(model)
    errors = {bits: relative(sample(quantized(*bits)), expected) for bits in [(8, 16), (8, 8), (4, 16), (4, 8)]}
    assert 0 < errors[8, 16] < errors[8, 8] < errors[4, 8] < 0.5
    assert errors[8, 16] < errors[4, 16] < 0.5


def test_source_model_and_other_clones_stay_as_they_are(sample, model, quantized):
    expected = sample(model)
    w8, w4 = quantized(8), quantized(4)
    first8, first4 = sample(w8), sample(w4)
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(w8), first8)
    assert torch.equal(sample(w4), first4)
    assert not any("forward_comfy_cast_weights" in module.__dict__ for module in model.model.modules())


def test_lora_reaches_quantized_layers_before_and_after(sample, model, quantized):
    """A weight patch as stock LoRA loaders make it; alternating with the plain model, which shares the weights."""
    generator = torch.Generator().manual_seed(0)
    key = "diffusion_model.middle_block.1.proj_in.weight"
    patch = {key: (0.3 * torch.randn(model.model.state_dict()[key].shape, generator=generator),)}

    def with_lora(source):
        patched = source.clone()
        assert patched.add_patches(patch, 0.8) == [key]
        return patched

    plain, full = sample(quantized()), sample(with_lora(model))
    before = sample(quantized(source=with_lora(model)))
    assert torch.equal(sample(quantized()), plain)
    after = sample(with_lora(quantized()))
    assert torch.equal(before, after)
    assert not torch.equal(before, plain) and not torch.equal(before, full)
    assert torch.equal(sample(with_lora(model)), full)


def test_quantizing_twice_is_refused(quantized):
    with pytest.raises(ValueError, match=r"^model: this MODEL is quantized already"):
        quantized(source=quantized())


def test_model_without_layers_is_refused(host, model, quantized):
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"^model: this MODEL has no Linear or Conv2d layer"):
        quantized(source=clone)
