"""What computes a quantized layer: the fastest backend if it can be timed, the user's choice, and little overhead."""

import copy
import sys
import types
import weakref

import pytest
import torch
from pack import pack_module
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.fast

LINEAR, CONV = "Linear", "Conv2d"
SHAPES = {LINEAR: (7, 48), CONV: (7, 5, 3, 3)}
FORMATS = [("int8", False), ("int8", True), ("int4", False)]  # kind, rotated


@pytest.fixture(scope="module")
def layers(host):
    """Return the module nodes.host.quantization.quantized_layers, as the host has loaded it."""
    return pack_module("nodes.host.quantization.quantized_layers")


@pytest.fixture
def clock(layers, monkeypatch, tmp_path):
    """Replace a GPU's clock: 8-bit products take clock.eight microseconds, the dequantized weight 4.0, the unquantized layer
    3.0.

    clock.asked: what was timed.
    """
    clock = types.SimpleNamespace(eight=2.0, asked=[], free=True, covers=lambda device: True, card=lambda device: "a card")

    def times(ways, device):
        clock.asked.append(list(ways))
        others = {layers.WEIGHT_ONLY: 4.0, layers.FULL: 3.0}
        return {name: others.get(name, clock.eight) for name in ways}

    clock.times, clock.is_free = times, lambda: clock.free
    monkeypatch.setattr(layers, "TIMES", type(layers.TIMES)(lambda: str(tmp_path / "profiles/kernel_times.json"), clock))
    return clock


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def make(layers):
    """Return make(layer, kind, rotated, dtype, **activation), which gives a quantized layer of normally distributed weights."""
    import comfy.ops

    quantization = pack_module("iec_core.quantization.packing")

    def build(layer=LINEAR, kind="int8", rotated=False, dtype=torch.float32, bits=8, **activation):
        operations, (out, inputs, *_) = comfy.ops.manual_cast, SHAPES[layer]
        plain = (
            operations.Linear(inputs, out, dtype=dtype)
            if layer == LINEAR
            else operations.Conv2d(inputs, out, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), dtype=dtype)
        )
        packing = quantization.Packing(SHAPES[layer], quantization.WeightFormat(kind, rotation=16 if rotated else 0))
        packed = packing.quantize(normal(*SHAPES[layer], seed=1))
        bias = normal(out, seed=2, dtype=dtype)
        return layers.class_for(plain).of("a", plain, packing, packed, bias, layers.ActivationFormat(bits, **activation))

    return build


def inputs(layer, dtype=torch.float32, rows=6):
    return normal(rows, 48, dtype=dtype) if layer == LINEAR else normal(rows, 5, 9, 8, dtype=dtype)


def dequantized(layer, x):
    """Return the layer's output with its dequantized weight in x's dtype, computed in float64."""
    weight = layer.packing.dequantize(layer.weight)
    if x.ndim == 2:
        return torch.nn.functional.linear(x.double(), weight.double(), layer.bias.double())
    weight = weight.to(x.dtype).double()
    return torch.nn.functional.conv2d(x.double(), weight, layer.bias.double(), (2, 1), (1, 0), (1, 2))


@pytest.mark.parametrize(("kind", "rotated"), FORMATS)
@pytest.mark.parametrize("name", SHAPES)
def test_the_faster_backend_is_used(layers, clock, make, name, kind, rotated):
    x = inputs(name)
    in_8_bits = make(name, kind, rotated, compute="8-bit")(x)
    assert clock.asked == []
    layer = make(name, kind, rotated)
    assert torch.equal(layer(x), in_8_bits)
    (asked,) = clock.asked
    backend = next(one for one in asked if one not in (layers.WEIGHT_ONLY, layers.FULL))
    assert len(asked) == 3
    why = f"microseconds: {backend} 2, dequantized weight 4, unquantized layer 3"
    assert str(layer.choice("cpu")) == f"{backend} ({why})"
    clock.eight = 5.0
    larger = inputs(name, rows=12)
    torch.testing.assert_close(layer(larger).double(), dequantized(layer, larger), rtol=1e-4, atol=1e-4)
    assert str(layer.choice("cpu")).startswith(f"dequantized weight (microseconds: {backend} 5, ") and len(clock.asked) == 2
    assert torch.equal(layer(x), in_8_bits) and len(clock.asked) == 2  # the earlier result for this size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_requested_backend_is_used_without_timing(clock, make, name, dtype):
    x = inputs(name, dtype)
    layer = make(name, dtype=dtype, compute="dequantized")
    tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(layer(x).double(), dequantized(layer, x), rtol=tolerance, atol=tolerance)
    assert str(layer.choice("cpu")).startswith("dequantized weight (as asked for, instead of ") and clock.asked == []
    clock.eight = 99.0
    in_8_bits = make(name, dtype=dtype, compute="8-bit")
    assert not torch.equal(in_8_bits(x), layer(x)) and "dequantized" not in str(in_8_bits.choice("cpu")) and clock.asked == []


def test_layers_of_a_kind_are_timed_once(clock, make):
    for layer in (make(), make()):
        layer(inputs(LINEAR))
    assert len(clock.asked) == 1
    others = (make(CONV), make(kind="int4"), make(rotated=True), make(per_tensor=True), make(dtype=torch.float16))
    for layer, dtype in zip(others, [torch.float32] * 4 + [torch.float16]):
        layer(inputs(CONV if layer is others[0] else LINEAR, dtype))
    assert len(clock.asked) == 6
    calibrated = make()
    calibrated.input_scale = torch.tensor(0.05)
    calibrated(inputs(LINEAR))
    others[0](inputs(CONV).to(memory_format=torch.channels_last))
    assert len(clock.asked) == 8


def test_choices_for_alternating_sizes_are_remembered(layers, clock, make, monkeypatch):
    layer, sizes = make(), (3, 6, 12)
    outputs = [layer(inputs(LINEAR, rows=rows)) for rows in sizes]
    monkeypatch.setattr(layers, "TIMES", None)
    for rows, output in zip(sizes, outputs):
        assert torch.equal(layer(inputs(LINEAR, rows=rows)), output)


def test_the_number_of_remembered_sizes_is_limited(layers, make):
    layer = make()
    for rows in range(1, 40):
        layer(inputs(LINEAR, rows=rows))
    assert len(layer._chosen) <= layers.REMEMBERED


def test_timing_that_was_not_possible_is_done_later(layers, clock, make):
    """Timing is not possible while a graph is captured, or when memory is short."""
    clock.free, clock.eight = False, 5.0
    layer, x = make(), inputs(LINEAR)
    in_8_bits = make(compute="8-bit")(x)
    assert torch.equal(layer(x), in_8_bits) and clock.asked == []
    clock.free = True
    assert not torch.equal(layer(x), in_8_bits) and len(clock.asked) == 1
    clock.free = False
    assert not torch.equal(make()(x), in_8_bits)  # the result also applies to other layers of the same kind


def test_a_wrong_input_does_not_affect_right_ones(clock, make):
    layer = make()
    with pytest.raises(RuntimeError, match=r"shape|size"):
        layer(normal(6, 40))
    for rows in (6, 20):
        assert layer(inputs(LINEAR, rows=rows)).shape == (rows, 7)
    assert len(clock.asked) == 2


def test_with_16_bit_activations_there_is_no_choice(clock, make):
    for name in SHAPES:
        layer = make(name, bits=16)
        layer(inputs(name))
        assert str(layer.choice("cpu")) == "dequantized weight"
    assert clock.asked == []


def test_the_dequantized_weight_is_used_if_nothing_is_faster(layers, make, monkeypatch):
    """This is the case on a device without integer products: no window is gathered, and activations are not quantized."""
    monkeypatch.setattr(layers, "conv_backend", lambda *_: layers.WEIGHT_ONLY)
    monkeypatch.setattr(layers, "linear_backend", lambda *_: layers.WEIGHT_ONLY)
    for name in SHAPES:
        layer, x = make(name), inputs(name)
        torch.testing.assert_close(layer(x).double(), dequantized(layer, x), rtol=1e-4, atol=1e-4)
        assert str(layer.choice("cpu")) == "dequantized weight"


def test_a_backend_that_fails_is_skipped(layers, clock, make, monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    layer, x = make(), inputs(LINEAR)
    monkeypatch.setattr(layers, "linear_int8", broken)
    torch.testing.assert_close(layer(x).double(), dequantized(layer, x), rtol=1e-4, atol=1e-4)
    assert "inf" in str(layer.choice("cpu"))
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_gradient_mode_computes_with_the_chosen_backend(layers, clock, make):
    x = inputs(LINEAR)
    for eight in (2.0, 5.0):
        clock.eight, layer = eight, make(dtype=torch.float32, rotated=eight == 5.0)  # another kind, which is timed again
        expected = layer(x)
        layer.passes_gradients = True
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timed", [None, 2.0, 5.0])
def test_a_compiled_layer_uses_earlier_timings(layers, clock, make, timed):
    torch._dynamo.reset()
    x = inputs(LINEAR)
    if timed:
        clock.eight = timed
        make()(x)
    compiled = torch.compile(make(), backend="eager", fullgraph=True, dynamic=False)
    expected = make(compute="dequantized" if timed == 5.0 else "8-bit")(inputs(LINEAR, rows=3))
    torch.testing.assert_close(compiled(inputs(LINEAR, rows=3)), expected)
    assert len(clock.asked) == bool(timed)


# The overhead around the products


class Operations(TorchDispatchMode):
    """List the operations that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("backend", "names"), [("KITCHEN", ["sum", "add"]), ("TRITON", ["reshape", "view", "view"])])
def test_few_operations_run_around_a_kernel(layers, make, monkeypatch, backend, names):
    """Even a view takes as long as the launch of a kernel."""
    core = sys.modules[layers.linear_int8.__module__]
    layer, x, out = make(dtype=torch.float16), normal(2, 3, 48, dtype=torch.float16), normal(2, 3, 7, dtype=torch.float16)
    monkeypatch.setattr(layers, "linear_backend", lambda *_: getattr(core, backend))
    monkeypatch.setattr(core.comfy_kitchen, "int8_linear", lambda *_, **__: out)
    monkeypatch.setattr(core.launch, "quantized", lambda x, *_: (x, x))
    pixels = out.reshape(6, 7, 1, 1)
    monkeypatch.setattr(core.launch, "conv2d", lambda *_: pixels)
    layer(x)  # makes its views and chooses its backend
    with Operations() as asked:
        assert layer(x).shape == (2, 3, 7)
    assert asked.names == names


def test_the_overhead_is_measured_with_all_kernels_stubbed(layers):
    import layer_overhead

    before = torch.nn.functional.linear, layers.linear_backend, layers.conv_backend
    found = layer_overhead.rows(repeat=1, calls=2)
    assert [name for name, *_ in found] == ["Linear, comfy-kitchen", "Linear, Triton", "Conv2d, Triton"]
    assert all(number > 0 for _, *numbers in found for number in numbers)
    assert before == (torch.nn.functional.linear, layers.linear_backend, layers.conv_backend)


def test_views_follow_the_weight(layers, make):
    x = inputs(LINEAR)
    layer, other = make(), make()
    layer(x)
    other.packing.stored(other.weight)[1].mul_(2)
    expected = other(x)
    layer.weight.data.copy_(other.weight)  # in place, as the host writes a LoRA
    assert torch.equal(layer(x), expected)
    layer = make()
    layer(x)
    layer.weight = torch.nn.Parameter(other.weight.clone(), requires_grad=False)
    assert torch.equal(layer(x), expected)
    layer = make()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)


def test_views_do_not_keep_a_weight_moved_to_another_device(make):
    layer = make()
    layer(inputs(LINEAR))
    network = torch.nn.Sequential(torch.nn.Sequential(layer))
    memory = weakref.ref(layer.weight.untyped_storage())
    network.to("meta")
    assert memory() is None


def test_a_copied_layer_has_its_own_views(layers, make):
    layer = make()
    x = inputs(LINEAR)
    expected = layer(x)
    copied = copy.deepcopy(layer)
    assert copied._views is None and torch.equal(copied(x), expected)
    copied.packing.stored(copied.weight)[1].mul_(2)
    assert not torch.equal(copied(x), expected) and torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_skipping_the_hosts_cast_does_not_change_the_output(layers, make, monkeypatch, name):
    layer, x = make(name), inputs(name)
    in_place = layer(x)
    monkeypatch.setattr(layers._QuantizedLayer, "_is_in_place", lambda *_: False)
    assert torch.equal(layer(x), in_place)


@pytest.mark.parametrize("what", ["weight function", "bias function", "bias of another type"])
def test_functions_and_other_bias_dtypes_use_the_hosts_cast(layers, make, monkeypatch, what):
    import comfy.ops

    layer, x, calls = make(), inputs(LINEAR), []
    plain, cast = layer(x), comfy.ops.cast_bias_weight
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *args, **more: calls.append(1) or cast(*args, **more))
    layer(x)
    assert calls == []
    if what == "weight function":
        layer.weight_function = [lambda weight: weight * 2]
        twice = torch.nn.functional.linear(x, 2 * layer.convert_weight(layer.weight), layer.bias)  # without rounding again
        torch.testing.assert_close(layer(x), twice)
    elif what == "bias function":
        layer.bias_function = [lambda bias: bias + 1]
        torch.testing.assert_close(layer(x), plain + 1)
    else:
        layer.bias.data = layer.bias.data.double()
        torch.testing.assert_close(layer(x), plain)
    assert calls == [1]


# In the nodes


@pytest.mark.parametrize("compute", ["fastest", "8-bit", "dequantized"])
def test_the_nodes_compute_input_sets_the_backend(host, model, layers, compute, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    bits = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True}
    quantized = host.run("IECQuantizeModel", model=model, **bits, compute=compute)[0]
    host.run("IECSaveQuantizedModel", model=quantized, name="q")
    loaded = host.run("IECLoadQuantizedModel", model_name="q.safetensors", compute=compute)[0]
    for made in (quantized, loaded):
        assert {layer.activation.compute for layer in layers.quantized_layers(made.model.diffusion_model).values()} == {compute}
    plain = host.run("IECQuantizeModel", model=model, **bits)[0]
    assert {layer.activation.compute for layer in layers.quantized_layers(plain.model.diffusion_model).values()} == {"fastest"}
    assert quantized.model_options["transformer_options"]["iec_quantize"] == "W8A8"  # so that profiles fit all of them


def test_impossible_compute_choices_are_refused(host):
    quantize, load = host.nodes["IECQuantizeModel"], host.nodes["IECLoadQuantizedModel"]
    for node in (quantize, load):
        assert node.validate_inputs(compute="4-bit") == "compute: '4-bit' is none of fastest, 8-bit, dequantized."
        assert node.validate_inputs(compute=None) is True
    assert quantize.validate_inputs(activation_bits="16", compute="8-bit") == (
        "compute: 8-bit works only with activation_bits 8; choose fastest, or other bits."
    )
    assert quantize.validate_inputs(activation_bits="16", compute="dequantized") is True
