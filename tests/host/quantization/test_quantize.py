"""IECQuantizeModel on the host's network."""

import copy
import gc
import weakref

import pytest
import torch
from pack import pack_module

PROJ_IN = "diffusion_model.middle_block.1.proj_in.weight"


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def quantized(host, model):
    def make(weight_bits=8, activation_bits=8, source=None, keep_sensitive_layers=True, **more):
        return host.run(
            "IECQuantizeModel", model=source or model, weight_bits=str(weight_bits), activation_bits=str(activation_bits),
            keep_sensitive_layers=keep_sensitive_layers, **more,
        )[0]  # fmt: skip

    return make


def layers_of(model):
    return {
        name: layer
        for name, layer in model.model.diffusion_model.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }


def evaluated_layers(model, run):
    """Return {name: (input, output)} of the first call of every Linear and Conv2d during run()."""
    seen, hooks = {}, []
    for name, layer in layers_of(model).items():

        def note(layer, inputs, output, name=name):
            seen.setdefault(name, (inputs[0].clone(), output.clone()))

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


def in_two_scales(weight, group):
    """Round a weight [O, K] to 4 bits in groups, by the definition, in float64.

    A group's scale, from its largest magnitude, is a float8 number of at most 128 times its channel's scale. A weight is the
    nearest of sixteen levels of the group's scale, and each level is an int8.
    """
    positive = torch.tensor([0.0529, 0.1597, 0.2696, 0.3850, 0.5089, 0.6451, 0.7995, 0.9815])
    levels = torch.cat([-positive.flip(0), positive])
    groups = weight.float().unflatten(1, (-1, group))
    largest = groups.abs().amax(2)
    channel = largest.amax(1, keepdim=True) / 128
    shares = (largest / channel).to(torch.float8_e4m3fn).float()
    nearest = ((groups / (shares * channel)[..., None])[..., None] - levels).abs().argmin(-1)
    return ((levels[nearest] * shares[..., None]).round().double() * channel.double()[..., None]).flatten(1)


def reference(layer, x, weight_bits, activation_bits, group=None, per_tensor=False):
    """Return a full-precision layer's output, quantized by the definition: int64 sums, then float64 scales."""
    weight = layer.weight.flatten(1) if layer.weight.ndim == 2 else layer.weight.permute(0, 2, 3, 1).flatten(1)
    if group and weight.shape[1] % group == 0 and activation_bits == 8:
        matrix = in_two_scales(weight, group)
    else:
        groups = weight.reshape(-1, group) if group and weight.shape[1] % group == 0 else weight
        values, scale = symmetric(groups, 2 ** (weight_bits - 1) - 1)
        matrix = (values * scale[:, None]).reshape(weight.shape)
    is_conv = isinstance(layer, torch.nn.Conv2d)
    pixels = is_conv and layer.kernel_size == (1, 1) and layer.stride == (1, 1)
    rows = x.movedim(1, -1) if is_conv else x
    if activation_bits == 16:
        rows = rows.double()
    else:
        parts = rows.flatten()[None] if per_tensor else (rows.flatten(0, -2) if pixels or not is_conv else rows.flatten(1))
        integers, factor = symmetric(parts, 127)
        rows = (integers * factor[:, None]).reshape(rows.shape)
    bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias
    if not is_conv:
        return rows @ matrix.t() + bias
    kernel = matrix.reshape(len(weight), *layer.kernel_size, -1).permute(0, 3, 1, 2)
    return torch.nn.functional.conv2d(rows.movedim(-1, 1), kernel, bias.double(), layer.stride, layer.padding)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits", "more"),
    [
        (8, 8, {}),
        (4, 8, {}),
        (8, 16, {}),
        (4, 16, {}),
        (4, 16, {"group_size": "32"}),
        (4, 8, {"group_size": "32"}),
        (8, 8, {"activation_scale": "tensor"}),
    ],
)
def test_every_layer_computes_by_the_definition(model, sample, quantized, weight_bits, activation_bits, more):
    variant = quantized(weight_bits, activation_bits, **more)
    seen, full = evaluated_layers(variant, lambda: sample(variant, steps=1)), layers_of(model)
    plain = {name for name in seen if name.split(".")[0] in ("time_embed", "label_emb")} | {"input_blocks.0.0", "out.2"}
    assert len(seen) > 60 and plain < set(seen)
    group = int(more.get("group_size", 0))
    for name, (x, output) in seen.items():
        exact = full[name](x)
        if name in plain:
            assert torch.equal(output, exact), name
            continue
        expected = reference(full[name], x, weight_bits, activation_bits, group, "activation_scale" in more)
        assert (output.double() - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert not torch.equal(output, exact), name


@pytest.mark.fast
def test_integer_sums_of_every_layer_equal_int64_bit_for_bit(sample, quantized, monkeypatch):
    """The test compares inputs and outputs of the integer kernels in a real run, before any scale is applied."""
    core = pack_module("iec_core.quantization.int8")
    int_matmul, conv2d_sums, seen = core.int_matmul, core.conv2d_sums, []

    def matmul(a, b):
        result = int_matmul(a, b)
        assert torch.equal(result.long(), a.long() @ b.long().t())
        seen.append("matmul")
        return result

    def convolve(x, w, size, stride, padding, dilation):
        result = conv2d_sums(x, w, size, stride, padding, dilation)
        kernel = w.view(len(w), *size, -1).permute(0, 3, 1, 2)
        exact = torch.nn.functional.conv2d(x.double(), kernel.double(), None, stride, padding, dilation)  # below 2^53
        assert torch.equal(result.long(), exact.long())
        seen.append("convolution")
        return result

    variant = quantized()
    monkeypatch.setattr(core, "int_matmul", matmul)
    monkeypatch.setattr(core, "conv2d_sums", convolve)
    sample(variant, steps=1)
    windows = [layer for layer in layers_of(variant).values() if getattr(layer, "kernel_size", (1, 1)) != (1, 1)]
    assert seen.count("convolution") == len(windows) - 2 > 15
    assert seen.count("matmul") > len(windows)


def test_sensitive_layers_can_be_quantized_too(model, sample, quantized):
    variant = quantized(keep_sensitive_layers=False)
    full = layers_of(model)
    seen = evaluated_layers(variant, lambda: sample(variant, steps=1))
    assert all(not torch.equal(output, full[name](x)) for name, (x, output) in seen.items())


def test_fewer_bits_cost_more_error(sample, model, quantized, relative):
    expected = sample(model)
    errors = {bits: relative(sample(quantized(*bits)), expected) for bits in [(8, 16), (8, 8), (4, 16), (4, 8), ("fp8", 16)]}
    assert 0 < errors[8, 16] < errors[8, 8] < errors[4, 8] < 0.5
    assert errors[8, 16] < errors["fp8", 16] < errors[4, 16] < 0.5
    grouped = relative(sample(quantized(4, 16, group_size="32")), expected)
    searched = relative(sample(quantized(4, 16, weight_scale="search")), expected)
    assert max(grouped, searched) < errors[4, 16]


@pytest.mark.fast
def test_memory_agrees_with_the_formats(model, quantized):
    """The sizes are the host's count; the source is in float32 here."""
    from comfy.model_management import module_size as size

    full = layers_of(model)
    total = size(model.model)
    for bits, share in (("8", 1 / 4), ("4", 1 / 8), ("fp8", 1 / 4)):
        variant = quantized(bits, 16)
        chosen = {name for name, layer in layers_of(variant).items() if layer.weight.dtype == torch.int8}
        weights = {name: layer.weight.nbytes for name, layer in full.items() if name in chosen}
        scales = sum(4 * len(layer.weight) for name, layer in full.items() if name in chosen)
        expected = total - sum(weights.values()) * (1 - share) + scales
        assert len(chosen) > 60 and abs(size(variant.model) - expected) < 16 * len(chosen)
        assert variant.model_size() == size(variant.model) < {"8": 0.3, "4": 0.18, "fp8": 0.3}[bits] * total


def test_source_model_and_other_clones_are_unchanged(sample, model, quantized):
    expected = sample(model)
    weights = {name: layer.weight.clone() for name, layer in layers_of(model).items()}
    w8, w4 = quantized(8), quantized(4)
    first8, first4 = sample(w8), sample(w4)
    assert torch.equal(sample(model), expected)
    assert torch.equal(sample(w8), first8)
    assert torch.equal(sample(w4), first4)
    assert not torch.equal(first8, first4)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers_of(model).items())


@pytest.fixture
def with_lora(model):
    """Return with_lora(source), which gives a clone with a weight patch as from the stock LoRA loaders."""
    shape = model.model.state_dict()[PROJ_IN].shape
    patch = {PROJ_IN: (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)}

    def patched(source):
        clone = source.clone()
        assert clone.add_patches(patch, 0.8) == [PROJ_IN]
        return clone

    return patched


def test_lora_before_is_quantized_with_the_weight(sample, model, quantized, relative, with_lora):
    """The patched weight is quantized, and the patch is applied once."""
    patched = with_lora(model)
    variant = quantized(source=patched)
    layer = variant.model.get_submodule(PROJ_IN.removesuffix(".weight"))
    generator = torch.Generator().manual_seed(0)
    plain = model.model.state_dict()[PROJ_IN]
    full = plain + 0.8 * torch.randn(plain.shape, generator=generator)
    values, scale = symmetric(full.flatten(1), 127)
    restored = layer.convert_weight(layer.weight)
    torch.testing.assert_close(restored.double().flatten(1), values * scale[:, None], rtol=1e-6, atol=1e-7)
    assert relative(sample(variant), sample(patched)) < 0.3 * relative(sample(quantized()), sample(patched))


def test_lora_after_quantization_is_applied_and_removed(sample, model, quantized, relative, with_lora):
    """Runs alternate with the MODEL without the LoRA, which shares the weights; the host itself patches the packed weight."""
    base = quantized()
    plain = sample(base)
    before, after = sample(quantized(source=with_lora(model))), sample(with_lora(base))
    assert torch.equal(sample(base), plain)
    effect = relative(sample(with_lora(model)), sample(model))
    assert relative(after, before) < 0.25 * effect and relative(after, plain) > 0.5 * effect
    assert torch.equal(sample(with_lora(base)), after)
    layer = base.model.get_submodule(PROJ_IN.removesuffix(".weight"))
    assert layer.weight.dtype == torch.int8 and not layer.weight_function  # patched once, without a cost in the steps


def test_lora_on_an_offloaded_layer_is_the_same(sample, quantized, with_lora):
    """In low VRAM the host leaves the weight unchanged and patches it in every evaluation."""
    base = quantized()
    patched = with_lora(base)
    key = PROJ_IN.removesuffix(".weight")
    expected = sample(patched)
    sample(base)  # the host removes the LoRA
    patched.load(torch.device("cpu"), lowvram_model_memory=1)
    layer = patched.model.get_submodule(key)
    assert len(layer.weight_function) == 1
    x = torch.randn(2, 16, layer.packing.inputs, generator=torch.Generator().manual_seed(3))
    offloaded = layer(x)
    patched.detach()
    patched.load(torch.device("cpu"), full_load=True)
    assert not layer.weight_function
    assert torch.equal(layer(x), offloaded)
    patched.detach()
    assert torch.equal(sample(patched), expected)


def test_merging_quantized_models(sample, model, quantized, relative, with_lora):
    """The host's ModelMergeSimple merges two quantized MODELs, and one with a full-precision MODEL."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    merge = ModelMergeSimple().merge
    one, other = quantized(8, 16), quantized(8, 16, source=with_lora(model))
    expected = sample(merge(model, with_lora(model), 0.5)[0])
    effect = relative(expected, sample(model))
    for merged in (merge(one, other, 0.5)[0], merge(one, with_lora(model), 0.5)[0]):
        assert relative(sample(merged), expected) < 0.3 * effect
    assert relative(sample(merge(model, other, 0.5)[0]), expected) < 0.3 * effect


def test_rotation_lowers_the_error_of_a_layer_with_outliers(sample, model, quantized, relative):
    """The layer with outliers is quantized, and the others are in full precision."""
    spiked = model.clone()
    layer = "input_blocks.3.1.transformer_blocks.0.ff.net.2"
    key = f"diffusion_model.{layer}.weight"
    weight = model.model.state_dict()[key]
    outliers = torch.zeros_like(weight)
    outliers[:, 3] = 20 * weight.std()
    spiked.add_patches({key: (outliers,)}, 1.0)
    expected = sample(spiked)
    plain, rotated = (
        relative(sample(quantized(4, 16, source=spiked, rotate=rotate, include=layer)), expected) for rotate in (False, True)
    )
    assert rotated < 0.5 * plain


def compiled(source):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = source.clone()
    set_torch_compile_wrapper(model=clone, backend="eager")
    return clone


def test_a_compiled_model_is_refused(model, quantized):
    with pytest.raises(ValueError, match=r"^model: this MODEL is compiled, and a compiled MODEL cannot be quantized"):
        quantized(source=compiled(model))


def names(model):
    return [name for name, layer in layers_of(model).items() if layer.weight.dtype == torch.int8]


@pytest.mark.fast
def test_layers_are_chosen_by_patterns(quantized):
    every, blocks = names(quantized()), names(quantized(include="input_blocks.*, middle_block.*"))
    assert blocks == [name for name in every if name.startswith(("input_blocks.", "middle_block."))]
    assert names(quantized(exclude="*.proj_in *.proj_out")) == [n for n in every if not n.endswith((".proj_in", ".proj_out"))]
    kept = set(every) - set(names(quantized(keep_output_projections=True)))
    assert kept == {name for name in every if name.endswith((".to_out.0", ".ff.net.2"))} != set()
    one = names(quantized(include="middle_block.*", exclude="middle_block.1.*"))
    assert one and all(name.startswith("middle_block.") and not name.startswith("middle_block.1.") for name in one)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"include": "nothing.*"}, r"^include: 'nothing\.\*' matches none of this MODEL's \d+ Linear and Conv2d layers"),
        ({"exclude": "*.proj_in, out"}, r"^exclude: 'out' matches none"),
        ({"include": "out.2"}, r"^include, exclude, keep_sensitive_layers: together they leave no layer"),
        ({"group_size": "32"}, r"^group_size: 32 works with weight_bits 8 only if activation_bits is 16; choose none"),
        ({"group_size": "32", "weight_bits": "fp8"}, r"^group_size: 32 works only with integers, and weight_bits is fp8; ch"),
    ],
)
def test_impossible_rules_are_refused(quantized, inputs, message):
    with pytest.raises(ValueError, match=message):
        quantized(**inputs)


def test_choices_are_validated(host):
    node = host.nodes["IECQuantizeModel"]
    for name in ("weight_bits", "activation_bits", "group_size", "weight_scale", "activation_scale"):
        assert node.validate_inputs(**{name: "9"}).startswith(f"{name}: '9' is none of ")
        assert node.validate_inputs(**{name: None}) is True


def test_every_layer_names_its_backend(quantized):
    said = {str(layer.choice("cpu")) for name, layer in layers_of(quantized()).items() if layer.weight.dtype == torch.int8}
    product = next(one for one in ("torch._int_mm", "exact products in float32") if one in said)  # depends on the processor
    assert said == {product, f"gathered windows, {product}"}
    fp8 = {str(layer.choice("cpu")) for layer in layers_of(quantized("fp8", 8)).values() if layer.weight.dtype == torch.int8}
    assert fp8 == {"dequantized weight"}


def test_quantizing_twice_is_refused(quantized):
    with pytest.raises(ValueError, match=r"^model: this MODEL is quantized already"):
        quantized(source=quantized())


def test_model_without_layers_is_refused(model, quantized):
    clone = model.clone()
    clone.model = copy.copy(model.model)
    clone.model._modules = {**model.model._modules, "diffusion_model": torch.nn.ReLU()}
    with pytest.raises(ValueError, match=r"^model: this MODEL has no Linear or Conv2d layer"):
        quantized(source=clone)


@pytest.mark.parametrize("key", ["diffusion_model", "diffusion_model.middle_block.0"])
def test_a_patch_of_the_unquantized_network_is_refused(model, quantized, key):
    clone = model.clone()
    clone.add_object_patch(key, torch.nn.Identity())
    with pytest.raises(ValueError, match=rf"^model: this MODEL has a patch on {key} that belongs to the unquantized network"):
        quantized(source=clone)


def test_patches_of_other_clones_do_not_affect_the_quantized_model(host, sample, model, quantized):
    expected = sample(quantized())
    sample(host.run("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False)[0])
    assert torch.equal(sample(quantized()), expected)
    own = host.run("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False)[0]
    assert not torch.equal(sample(quantized(source=own)), expected)


def test_a_source_that_was_offloaded_and_patched(sample, model, quantized):
    """The source is quantized while its biases are patched too; what the host leaves on its layers is not copied."""
    bias = PROJ_IN.replace("weight", "bias")
    clone = model.clone()
    clone.add_patches({bias: (torch.ones_like(model.model.state_dict()[bias]),)}, 1.0)
    expected = sample(quantized(source=clone))
    clone.load(torch.device("cpu"), lowvram_model_memory=1)
    offloaded = quantized(source=clone)
    clone.detach()
    assert torch.equal(sample(offloaded), expected)
    sample(clone)
    patched_in_place = quantized(source=clone)
    assert torch.equal(sample(patched_in_place), expected)
    assert torch.equal(sample(quantized(source=clone)), expected)
    sample(model)  # the host then removes the patch


def test_the_quantized_model_keeps_no_reference_to_its_source(host, model, quantized):
    """The quantized MODEL has no reference to the source's network."""
    from comfy import model_management

    source = host.run("IECLoadBuiltinModel", precision="float32")[0]
    network = weakref.ref(source.model.diffusion_model)
    variant = quantized(source=host.run("IECDeepCache", model=source.clone(), interval=2, branch=0)[0])
    del source
    model_management.cleanup_models_gc()
    gc.collect()
    assert network() is None and variant.model.diffusion_model is not None


def test_leftover_attributes_of_the_sources_layers_are_not_copied(sample, model, quantized):
    """A removed bypass LoRA of ComfyUI 0.33 leaves an instance attribute `forward` on each layer."""
    expected = sample(quantized())
    found = list(layers_of(model).values())
    try:
        for layer in found:
            layer.forward = layer.forward
        variant = quantized()
    finally:
        for layer in found:
            del layer.forward
    assert not any("forward" in vars(layer) for layer in layers_of(variant).values())
    assert torch.equal(sample(variant), expected)


def test_unquantized_weights_keep_the_dtype_that_the_host_loads(sample, model, quantized):
    """ComfyUI 0.33's dynamic loader keeps a file's dtype until a layer is loaded, and stores the model's dtype on the layer."""
    layer = model.model.diffusion_model.out[2]
    layer.weight_comfy_model_dtype = torch.bfloat16
    try:
        assert quantized().model.diffusion_model.out[2].weight.dtype == torch.bfloat16
    finally:
        del layer.weight_comfy_model_dtype
    assert quantized().model.diffusion_model.out[2].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": "4", "rotate": True}, {"weight_bits": "4", "weight_scale": "search"},
        {"weight_bits": "4", "activation_bits": "16", "group_size": "32"}, {"weight_bits": "fp8"},
        {"weight_bits": "4", "group_size": "16"},
    ],
)  # fmt: skip
def test_offloaded_is_the_same_in_every_format(quantized, with_lora, settings):
    patched = with_lora(quantized(**settings))
    layer = patched.model.get_submodule(PROJ_IN.removesuffix(".weight"))
    x = torch.randn(2, 16, layer.packing.inputs, generator=torch.Generator().manual_seed(3))
    patched.load(torch.device("cpu"), lowvram_model_memory=1)
    offloaded = layer(x)
    patched.detach()
    patched.load(torch.device("cpu"), full_load=True)
    assert torch.equal(layer(x), offloaded)
    patched.detach()


def test_names_of_quantizations(quantized):
    """Two quantizations have the same name only if they are the same."""

    def name(**inputs):
        return quantized(**inputs).model.iec_quantization

    assert name() == "W8A8"
    assert name(activation_bits=16, group_size="32") == "W8A16, groups of 32"
    assert name(weight_bits=4, group_size="16") == "W4A8, groups of 16"
    assert name(exclude="*.proj_in") == "W8A8, not *.proj_in"
    assert name(keep_sensitive_layers=False) == "W8A8 of all layers"
    every = names(quantized())[:4]
    one, other = name(exclude=" ".join(every)), name(exclude=" ".join(every[:3]))
    assert one.startswith("W8A8, not 4 names (") and other.startswith("W8A8, not 3 names (") and len(one) < 60
