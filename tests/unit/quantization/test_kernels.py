"""The Triton kernels in Triton's interpreter, compared with integer sums in float64."""

import dataclasses
import functools
import importlib.util
import itertools
import logging
import pathlib
import subprocess
import sys

import pack
import pytest
import torch

from iec_core import metrics
from iec_core.quantization import int8
from iec_core.quantization.kernels import launch, operators
from iec_core.quantization.kernels.operators import conv2d_int8
from iec_core.quantization.kernels.tiles import GROUP, Product, Tile

UNIT = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation
SAME = ((1, 1), (1, 1), (1, 1))
SHAPES = {  # x, output channels, window, (stride, padding, dilation)
    "3x3": ((2, 40, 11, 9), 7, (3, 3), SAME),
    "3x3 of 4 channels": ((2, 4, 8, 8), 37, (3, 3), SAME),
    "3x3 of 64 channels": ((1, 64, 9, 8), 33, (3, 3), SAME),
    "1x1 of 3 channels": ((1, 3, 7, 6), 33, (1, 1), UNIT),
    "1x1 with stride 2": ((2, 33, 6, 7), 5, (1, 1), ((2, 2), (0, 0), (1, 1))),
    "1x1 of one pixel": ((3, 65, 1, 1), 4, (1, 1), UNIT),
    "stride 2": ((1, 64, 9, 10), 40, (3, 3), ((2, 2), (1, 1), (1, 1))),
    "dilation 2": ((2, 6, 12, 10), 8, (3, 3), ((1, 1), (2, 2), (2, 2))),
    "5x5": ((1, 5, 13, 12), 6, (5, 5), ((1, 1), (2, 2), (1, 1))),
    "nothing symmetric": ((2, 35, 10, 13), 9, (2, 5), ((1, 2), (2, 1), (2, 1))),
    "one output pixel": ((2, 8, 3, 4), 32, (3, 4), UNIT),
    "one channel": ((2, 1, 5, 6), 3, (3, 3), SAME),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request):
    if request.node.name != "test_imports_without_triton":
        builder = pytest.importorskip("triton.runtime.interpreter").interpreter_builder
        # The interpreter checks every addition for overflow, which takes half of its time, and reports nothing.
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(out_channels, kernel, channels):
    """Return int8 [O, kh, kw, C] that contains the extreme values."""
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(-127, 128, (out_channels, *kernel, channels), dtype=torch.int8, generator=generator)


def quantized(x, scale):
    return (x.float() / scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127).to(torch.int8)


def dynamic(x):
    """Return the scale of each item."""
    return x.float().flatten(1).abs().amax(1) / 127


def reference_sums(x, scale, weight, geometry):
    """Return the sums in float64, whose 53 bits hold them exactly."""
    values = [tensor.double() for tensor in (quantized(x, scale), weight.permute(0, 3, 1, 2))]
    return torch.nn.functional.conv2d(*values, None, *geometry).long()


def sums_of(x, given, weight, geometry, channels_last=False, plan=None):
    values, scale = launch.quantized(x, given, False)
    return launch.conv2d(values, scale, weight, None, None, *geometry, torch.int32, channels_last, plan)


def assert_exact(x, weight, geometry, **more):
    sums = sums_of(x, None, weight, geometry, **more)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), reference_sums(x, dynamic(x), weight, geometry))
    return sums


@pytest.mark.parametrize(("case", "dtype"), zip(SHAPES.values(), itertools.cycle(DTYPES)), ids=SHAPES)
def test_sums_are_exact(case, dtype):
    """A sum does not depend on the dtype before quantization: each shape is tested with one of the three."""
    shape, out_channels, kernel, geometry = case
    assert_exact(random(*shape).to(dtype), random_weight(out_channels, kernel, shape[1]), geometry)


SMALL_TILE = Tile(32, 32, 32, 4, 1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_several_programs_may_share_the_reduction_loop(channels_last):
    """The loop has six steps, two for each row of the window. It is split within a row, by rows, and by steps."""
    x, weight, geometry = random(2, 40, 5, 4), random_weight(37, (3, 1), 40), ((1, 1), (1, 0), (1, 1))
    assert Product(40, 37, 40, 3).steps(SMALL_TILE) == 6
    values, scale = launch.quantized(x, None, False)
    scaling = torch.rand(37), torch.rand(37)
    scaled = functools.partial(launch.conv2d, values, scale, weight, *scaling, *geometry, torch.float32, channels_last)
    whole = scaled((SMALL_TILE, 1))
    for splits in (2, 3, 6):
        plan = SMALL_TILE, splits
        sums = assert_exact(x, weight, geometry, channels_last=channels_last, plan=plan)
        assert sums.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert torch.equal(whole, scaled(plan))


def test_tiles_in_groups_are_all_computed():
    """There are more rows of tiles than one group holds, and the last group is incomplete."""
    assert Product(25 * 23, 40, 8, 1).programs(SMALL_TILE) == (2 * GROUP + 2) * 2
    assert_exact(random(1, 8, 25, 23), random_weight(40, (1, 1), 8), UNIT, plan=(SMALL_TILE, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [None, torch.tensor(0.01)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(3, 20, 6, 5), (2, 300, 9, 7), (5, 70, 1, 1), (1, 4, 40, 41)])
def test_quantized_values_and_their_scale(shape, channels_last, given, dtype):
    x = (random(*shape) * torch.logspace(-1, 1, shape[0])[:, None, None, None]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    values, scale = launch.quantized(x, given, False)
    expected = dynamic(x) if given is None else given.expand(shape[0])
    assert torch.equal(scale, expected) and values.is_contiguous()
    assert torch.equal(values.permute(0, 3, 1, 2), quantized(x, expected))
    values, scale = launch.quantized(x, given, True)
    expected = x.float().abs().amax()[None] / 127 if given is None else expected
    assert torch.equal(scale, expected) and torch.equal(values.permute(0, 3, 1, 2), quantized(x, expected))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("given", [None, torch.tensor(0.1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_nan_and_infinity_give_nan_outputs(given, broken, channels_last):
    """Only the item with the value becomes NaN, as on every other backend; the other values have all sizes."""
    x, weight = random(4, 70, 9, 8) * 1e30, random_weight(8, (1, 1), 70)
    x[1, 3, 4, 5] = broken
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    out = conv2d_int8(x, given, False, weight, torch.ones(8), None, *UNIT, torch.float32)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
    if given is None:
        assert conv2d_int8(x, given, True, weight, torch.ones(8), None, *UNIT, torch.float32).isnan().all()


def test_all_zeros_have_a_scale_of_1():
    x = random(2, 5, 4, 4) * torch.tensor([1.0, 0.0])[:, None, None, None]
    values, scale = launch.quantized(x, None, False)
    assert scale[1] == 1 and not values[1].any() and values[0].any()


def test_a_given_scale_saturates():
    x, weight = random(3, 20, 6, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None, None, None], random_weight(6, (3, 3), 20)
    given = torch.tensor([0.01])
    values = quantized(x, given).abs().flatten(1)
    assert values[0].amax() < 127 and (values[2] == 127).float().mean() > 0.8
    assert torch.equal(sums_of(x, given, weight, SAME).long(), reference_sums(x, given, weight, SAME))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_at_the_extremes(sign):
    x, weight = torch.full((1, 1024, 3, 3), sign * 127.0), torch.full((2, 3, 3, 1024), -127, dtype=torch.int8)
    plan = Tile(32, 32, 256, 4, 1), 1
    assert sums_of(x, torch.ones(1), weight, UNIT, plan=plan).flatten().tolist() == [-int(sign) * 127 * 127 * 9 * 1024] * 2


def rounding_cases():
    """Return scales, and values around every multiple of half a scale, where one bit decides the rounding; and the extremes."""
    scale = torch.cat([random(15).abs() + 0.01, torch.tensor([0.5])]) * torch.logspace(-6, 6, 16)
    halves = torch.arange(-260, 261) / 2 * scale[:, None]
    above, below = (torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (torch.inf, -torch.inf))
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e30, -3e38, torch.inf, -torch.inf]).expand(16, -1)
    return torch.cat([halves, above, below, extremes, random(16, 473) * 60 * scale[:, None]], dim=1), scale


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantization_is_bit_exact(dtype):
    values, scale = rounding_cases()
    for row, given in zip(values.to(dtype).reshape(16, 1, 4, 511, 1), scale):
        found = launch.quantized(row, given, False)[0].permute(0, 3, 1, 2)
        assert torch.equal(found, quantized(row, given)) and found.amax() == 127 and found.amin() == -127


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_is_the_sums_times_both_scales(dtype, per_tensor, with_bias):
    x, weight, geometry = random(2, 40, 7, 6).to(dtype), random_weight(33, (3, 3), 40), ((2, 1), (1, 1), (1, 1))
    weight_scale, bias = random(33, seed=2).abs() / 1000, random(33, seed=3).to(dtype) if with_bias else None
    out = conv2d_int8(x, None, per_tensor, weight, weight_scale, bias, *geometry, dtype)
    assert out.dtype == dtype and out.is_contiguous()
    scale = dynamic(x[None].flatten(1)) if per_tensor else dynamic(x)
    expected = reference_sums(x, scale, weight, geometry) * scale.double()[:, None, None, None]
    expected = expected * weight_scale.double()[:, None, None]
    if with_bias:
        expected += bias.double()[:, None, None]
    # the interpreter truncates float32 to bfloat16, where a GPU rounds
    rtol = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-5)


def test_output_may_have_another_type():
    x, weight = random(1, 4, 5, 5).half(), random_weight(3, (1, 1), 4)
    arguments = (x, torch.tensor([0.02]), False, weight, torch.full((3,), 0.01), None, *UNIT)
    half, single = conv2d_int8(*arguments, torch.float16), conv2d_int8(*arguments, torch.float32)
    assert half.dtype == torch.float16 and single.dtype == torch.float32
    assert torch.equal(half, single.half())


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[1:, 3:],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, 5:],
    ],
    ids=["channels-last", "every other row", "offset", "transposed", "expanded", "some channels of channels-last"],
)
def test_input_may_have_any_strides(strided):
    x = strided(random(2, 20, 9, 8))
    assert_exact(x, random_weight(6, (3, 3), x.shape[1]), SAME)


@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (3, 6, 1, 1), (2, 1, 5, 4), (0, 6, 5, 4)])
def test_channels_last_inputs_give_channels_last_outputs(shape):
    x, weight = random(*shape), random_weight(8, (3, 3), shape[1])
    first, last = (
        conv2d_int8(one, None, False, weight, torch.ones(8), None, *SAME, x.dtype)
        for one in (x, x.contiguous(memory_format=torch.channels_last))
    )
    assert torch.equal(first, last) and first.is_contiguous()
    if 1 not in shape and x.numel():
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_other_arguments_may_have_any_strides():
    x, weight = random(2, 6, 5, 5), random_weight(8, (3, 3), 6)
    bias = torch.rand(8, 2)
    strided = conv2d_int8(
        x, None, False, weight.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), bias[:, 0], bias[:, 1], *UNIT, x.dtype
    )
    vectors = (weight, bias[:, 0].clone(), bias[:, 1].clone())
    assert torch.equal(strided, conv2d_int8(x, None, False, *vectors, *UNIT, x.dtype))


def test_items_of_a_batch_do_not_affect_each_other():
    x, weight = random(3, 12, 5, 7), random_weight(9, (3, 3), 12)
    together = sums_of(x, None, weight, SAME)
    assert torch.equal(together, torch.cat([sums_of(x[i : i + 1], None, weight, SAME) for i in range(3)]))


def test_shapes_that_do_not_fit_are_refused():
    values, weight = torch.zeros(2, 5, 5, 6, dtype=torch.int8), random_weight(8, (3, 3), 6)
    with pytest.raises(ValueError, match="do not fit"):
        launch.conv2d(values[..., :5], torch.ones(2), weight, None, None, *UNIT, torch.int32, False)
    with pytest.raises(ValueError, match="do not fit"):
        launch.conv2d(values, torch.ones(3), weight, None, None, *UNIT, torch.int32, False)


LAYERS = list(itertools.product([None, torch.tensor(0.02)], [False, True]))  # scale, per_tensor


@pytest.mark.parametrize(("scale", "per_tensor"), LAYERS)
@pytest.mark.parametrize("rotation", [0, 16])
def test_layers_agree_with_and_without_triton(monkeypatch, scale, per_tensor, rotation):
    """Linear and Conv2d layers are computed by the kernels and by PyTorch's products of the same integers."""
    rows, image, bias = random(2, 5, 48), random(2, 5, 7, 6), random(20, seed=5)
    matrix, window = random_weight(20, (), 48), random_weight(20, (3, 3), 5).flatten(1)
    weight_scale = random(20, seed=4).abs() / 500

    def both():
        linear = int8.linear_int8(rows, matrix, weight_scale, bias, scale, per_tensor, rotation)
        convolved = int8.conv2d_int8(image, window, weight_scale, bias, (3, 3), *SAME, scale, per_tensor)
        return linear, convolved

    assert int8.linear_backend("cpu", True, 20, 48) == int8.conv_backend("cpu") == int8.TRITON
    by_kernels = both()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert int8.TRITON not in (int8.linear_backend("cpu", True, 20, 48), int8.conv_backend("cpu"))
    for found, expected in zip(by_kernels, both()):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def operator_arguments(bias, scale=None):
    x, weight = random(2, 5, 8, 7).half(), random_weight(6, (3, 2), 5)
    return x, scale, False, weight, torch.full((6,), 0.01), bias, (2, 1), (1, 0), (1, 2), torch.bfloat16


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)], ids=["no bias", "bias"])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.02)], ids=["dynamic", "given"])
def test_operator_is_registered_correctly(bias, scale):
    torch.library.opcheck(torch.ops.iec.conv2d_int8.default, operator_arguments(bias, scale))


def test_compiles_to_one_operator():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def layer(*arguments):
        return conv2d_int8(*arguments)

    arguments = operator_arguments(torch.ones(6))
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.equal(compiled(*arguments), layer(*arguments))
    assert graphs == [[torch.ops.iec.conv2d_int8.default]]


def test_second_import_shares_the_operator(monkeypatch):
    """A host imports the pack under another name; replacing the operator would crash calls through the first import."""
    arguments = operator_arguments(None)
    expected, operator = conv2d_int8(*arguments), torch.ops.iec.conv2d_int8.default
    folder = pathlib.Path(metrics.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "second", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )  # fmt: skip
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "second", importlib.util.module_from_spec(spec))
    again = importlib.import_module("second.quantization.kernels.operators")
    assert again is not operators and torch.ops.iec.conv2d_int8.default is operator
    assert torch.equal(again.conv2d_int8(*arguments), expected)
    assert torch.equal(conv2d_int8(*arguments), expected)
    for name in set(sys.modules) - before:
        monkeypatch.delitem(sys.modules, name)


def test_is_available_in_the_interpreter(monkeypatch):
    assert launch.is_available("cpu") and launch.is_available("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not launch.is_available("cpu")


REASONS = {  # the device, the installed software, and why its kernels are not used
    "old": ("cuda:0", {"capability": (7, 5)}, "they need compute capability 8.0, and this GPU has 7.5"),
    "AMD": ("cuda:0", {"hip": "6.4"}, "they are only for NVIDIA's GPUs"),
    "Apple": ("mps", {}, "they are only for NVIDIA's GPUs"),
    "no Triton": ("cuda:0", {"triton": None}, "Triton is not installed"),
    "no compiler": (
        "cuda:0", {"error": RuntimeError("Failed to find C compiler.\nPlease specify via CC")},
        "RuntimeError: Failed to find C compiler",
    ),
    "too old": ("cuda:0", {"error": AttributeError("module 'triton.language' has no attribute 'clamp'")}, "AttributeError"),
    "wrong": ("cuda:0", {"computes": False}, "its compiled kernels compute wrong results"),
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Return gpu(capability, hip, triton, error, computes), which sets the properties of a GPU and the results of its
    kernels.
    """

    def be(capability=(9, 0), hip=None, triton=launch.triton, error=None, computes=True):
        def compute(device):
            if error:
                raise error
            return computes

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(launch, "triton", triton)
        monkeypatch.setattr(launch, "_computes", compute)
        return launch.compiles.__wrapped__  # without its cache of devices

    monkeypatch.delenv("TRITON_INTERPRET")
    return be


@pytest.mark.parametrize(("device", "what", "reason"), REASONS.values(), ids=REASONS)
def test_a_warning_says_why_kernels_cannot_be_used(gpu, caplog, device, what, reason):
    assert not gpu(**what)(torch.device(device))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"On {device}, " in record.message
    assert f"cannot be used: {reason}" in record.message and "\n" not in record.message


def test_there_is_no_warning_if_kernels_can_be_used(gpu, caplog):
    assert gpu()(torch.device("cuda:0")) and not caplog.records
    with pytest.raises(torch.OutOfMemoryError):
        gpu(error=torch.OutOfMemoryError("Tried to allocate"))(torch.device("cuda:0"))
    assert not caplog.records


def test_the_computation_that_probes_a_gpu_is_correct():
    """The interpreter computes it correctly."""
    assert launch._computes(torch.device("cpu"))


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import pack; launch = pack.load('iec_core.quantization.kernels.launch')"
    code += "; assert not launch.is_available('cpu') and launch.triton is None and not launch.is_available('mps')"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(pathlib.Path(pack.__file__).parent)})
