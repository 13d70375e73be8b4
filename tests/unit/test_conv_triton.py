"""The Triton kernel in Triton's interpreter, against sums of integers in float64."""

import runpy
import subprocess
import sys
import types

import pytest
import torch

from iec_core import conv_triton
from iec_core.conv_triton import conv2d_int8, conv2d_int8_sums, is_available

UNIT = ((1, 1), (0, 0), (1, 1))  # stride, padding, dilation
SHAPES = {  # x, output channels, window, (stride, padding, dilation)
    "3x3": ((2, 40, 11, 9), 7, (3, 3), ((1, 1), (1, 1), (1, 1))),
    "3x3 of 4 channels": ((2, 4, 8, 8), 37, (3, 3), ((1, 1), (1, 1), (1, 1))),
    "1x1 of 3 channels": ((1, 3, 7, 6), 33, (1, 1), UNIT),
    "1x1 with stride 2": ((2, 33, 6, 7), 5, (1, 1), ((2, 2), (0, 0), (1, 1))),
    "1x1 of one pixel": ((3, 65, 1, 1), 4, (1, 1), UNIT),
    "stride 2": ((1, 64, 9, 10), 40, (3, 3), ((2, 2), (1, 1), (1, 1))),
    "dilation 2": ((2, 6, 12, 10), 8, (3, 3), ((1, 1), (2, 2), (2, 2))),
    "5x5": ((1, 5, 13, 12), 6, (5, 5), ((1, 1), (2, 2), (1, 1))),
    "nothing symmetric": ((2, 35, 10, 13), 9, (2, 5), ((1, 2), (2, 1), (2, 1))),
    "one output pixel": ((2, 8, 3, 4), 32, (3, 4), UNIT),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request):
    if "without_triton" not in request.node.name:
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weight(out_channels, kernel, channels):
    """int8 [O, kh, kw, C], with the extremes among its values."""
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(-127, 128, (out_channels, *kernel, channels), dtype=torch.int8, generator=generator)


def quantized(x, scale):
    return (x.float() / scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127).to(torch.int8)


def reference_sums(x, scale, weight, geometry):
    """The sums in float64, whose 53 bits hold them exactly."""
    values = [tensor.double() for tensor in (quantized(x, scale), weight.permute(0, 3, 1, 2))]
    return torch.nn.functional.conv2d(*values, None, *geometry).long()


def assert_exact(x, scale, weight, geometry):
    sums = conv2d_int8_sums(x, scale, weight, *geometry)
    assert sums.dtype == torch.int32 and sums.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(sums.long(), reference_sums(x, scale, weight, geometry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "geometry"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact(shape, out_channels, kernel, geometry, dtype):
    x = random(*shape).to(dtype)
    scale = x.float().flatten(1).abs().amax(1) / 127
    assert_exact(x, scale, random_weight(out_channels, kernel, shape[1]), geometry)


def test_one_scale_serves_all_items_and_saturates():
    x, weight = random(3, 20, 6, 5) * torch.tensor([0.1, 1.0, 10.0])[:, None, None, None], random_weight(6, (3, 3), 20)
    geometry, scale = ((1, 1), (1, 1), (1, 1)), torch.tensor([0.01])
    values = quantized(x, scale).abs().flatten(1)
    assert values[0].amax() < 127 and (values[2] == 127).float().mean() > 0.8
    assert_exact(x, scale, weight, geometry)
    assert torch.equal(
        conv2d_int8_sums(x, scale, weight, *geometry), conv2d_int8_sums(x, scale.expand(3).clone(), weight, *geometry)
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sums_at_the_extremes(sign):
    x, weight = torch.full((1, 1024, 3, 3), sign * 127.0), torch.full((2, 3, 3, 1024), -127, dtype=torch.int8)
    sums = conv2d_int8_sums(x, torch.ones(1), weight, *UNIT)
    assert sums.flatten().tolist() == [-int(sign) * 127 * 127 * 9 * 1024] * 2


def rounding_cases():
    """Scales, and values around every multiple of half a scale, where one bit decides the rounding; and the extremes."""
    scale = torch.cat([random(15).abs() + 0.01, torch.tensor([0.5])]) * torch.logspace(-6, 6, 16)
    halves = torch.arange(-260, 261) / 2 * scale[:, None]
    above, below = (torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (torch.inf, -torch.inf))
    extremes = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1e30, -3e38, torch.inf, -torch.inf]).expand(16, -1)
    return torch.cat([halves, above, below, extremes, random(16, 473) * 60 * scale[:, None]], dim=1), scale


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantization_is_bit_exact(dtype):
    values, scale = rounding_cases()
    x = values.to(dtype).reshape(16, 4, 511, 1)  # the convolution with the identity returns what it quantized
    identity = torch.eye(4, dtype=torch.int8)[:, None, None, :]
    sums = conv2d_int8_sums(x, scale, identity, *UNIT)
    assert torch.equal(sums.to(torch.int8), quantized(x, scale))
    assert sums.amax() == 127 and sums.amin() == -127


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("items", [1, 2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_is_the_sums_times_both_scales(dtype, items, with_bias):
    x, weight, geometry = random(2, 40, 7, 6).to(dtype), random_weight(33, (3, 3), 40), ((2, 1), (1, 1), (1, 1))
    scale, weight_scale = random(items, seed=1).abs() / 40 + 0.01, random(33, seed=2).abs() / 1000
    bias = random(33, seed=3).to(dtype) if with_bias else None
    out = conv2d_int8(x, scale, weight, weight_scale, bias, *geometry, dtype)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    expected = reference_sums(x, scale, weight, geometry) * scale.double()[:, None, None, None]
    expected = expected * weight_scale.double()[:, None, None]
    if with_bias:
        expected += bias.double()[:, None, None]
    # the interpreter cuts float32 off to bfloat16, where a GPU rounds
    rtol = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-5)


def test_output_may_have_another_type():
    x, weight = random(1, 4, 5, 5).half(), random_weight(3, (1, 1), 4)
    arguments = (x, torch.tensor([0.02]), weight, torch.full((3,), 0.01), None, *UNIT)
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
    assert_exact(x, torch.full((len(x),), 0.02), random_weight(6, (3, 3), x.shape[1]), ((1, 1), (1, 1), (1, 1)))


def test_other_arguments_may_have_any_strides():
    x, weight = random(2, 6, 5, 5), random_weight(8, (3, 3), 6)
    scales, bias = torch.rand(2, 2) / 20 + 0.01, torch.rand(8, 2)
    strided = conv2d_int8(
        x, scales[:, 1], weight.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), bias[:, 0], bias[:, 1], *UNIT, x.dtype
    )
    vectors = (scales[:, 1].clone(), weight, bias[:, 0].clone(), bias[:, 1].clone())
    assert torch.equal(strided, conv2d_int8(x, *vectors, *UNIT, x.dtype))


def test_items_do_not_depend_on_their_neighbours():
    x, scale = random(3, 12, 5, 7), torch.tensor([0.01, 0.02, 0.03])
    weight, geometry = random_weight(9, (3, 3), 12), ((1, 1), (1, 1), (1, 1))
    together = conv2d_int8_sums(x, scale, weight, *geometry)
    alone = [conv2d_int8_sums(x[i : i + 1], scale[i : i + 1], weight, *geometry) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_shapes_that_do_not_fit_are_refused():
    x, weight = random(2, 6, 5, 5), random_weight(8, (3, 3), 6)
    with pytest.raises(ValueError, match="do not fit"):
        conv2d_int8_sums(x[:, :5], torch.ones(2), weight, *UNIT)
    with pytest.raises(ValueError, match="do not fit"):
        conv2d_int8_sums(x, torch.ones(3), weight, *UNIT)


def operator_arguments(bias):
    x, weight = random(2, 5, 8, 7).half(), random_weight(6, (3, 2), 5)
    return x, torch.tensor([0.02, 0.03]), weight, torch.full((6,), 0.01), bias, (2, 1), (1, 0), (1, 2), torch.bfloat16


@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)], ids=["no bias", "bias"])
def test_operator_is_registered_correctly(bias):
    torch.library.opcheck(torch.ops.iec.conv2d_int8.default, operator_arguments(bias))


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


def test_second_import_shares_the_operator():
    """A host imports the module under a name of its own; replacing the operator would crash calls through the first."""
    arguments = operator_arguments(None)
    expected, operator = conv2d_int8(*arguments), torch.ops.iec.conv2d_int8.default
    again = runpy.run_path(conv_triton.__file__)
    assert torch.ops.iec.conv2d_int8.default is operator
    assert torch.equal(again["conv2d_int8"](*arguments), expected)
    assert torch.equal(conv2d_int8(*arguments), expected)


def test_is_available_in_the_interpreter_and_on_recent_gpus(monkeypatch):
    assert is_available("cpu") and is_available("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    for has_cuda, major, expected in [(False, 0, False), (True, 7, False), (True, 8, True)]:
        properties = types.SimpleNamespace(major=major)
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert is_available("cuda") == is_available(torch.device("cuda", 0)) == expected
        assert not is_available("cpu") and not is_available(torch.device("mps"))


def test_imports_without_triton():
    code = f"import runpy, sys; sys.modules['triton'] = None; module = runpy.run_path({conv_triton.__file__!r})"
    code += "; assert not module['is_available']('cuda') and not module['is_available']('cpu')"
    subprocess.run([sys.executable, "-c", code], check=True)
