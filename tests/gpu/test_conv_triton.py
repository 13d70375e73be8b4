"""The Triton kernel on a GPU, at the sizes of diffusion models, against sums in float64. Run with `make test-gpu`."""

import pytest
import torch

from iec_core.conv_triton import conv2d_int8, conv2d_int8_sums, is_available

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")

SAME = ((1, 1), (1, 1), (1, 1))  # stride, padding, dilation
SHAPES = {  # x, output channels, window, (stride, padding, dilation)
    "320x64x64": ((2, 320, 64, 64), 320, 3, SAME),
    "1280x32x32": ((1, 1280, 32, 32), 1280, 3, SAME),
    "2560x8x8": ((2, 2560, 8, 8), 1280, 3, SAME),
    "4 channels": ((2, 4, 64, 64), 320, 3, SAME),
    "to 4 channels": ((2, 320, 64, 64), 4, 3, SAME),
    "stride 2": ((2, 320, 64, 64), 320, 3, ((2, 2), (1, 1), (1, 1))),
    "1x1": ((2, 640, 32, 32), 640, 1, ((1, 1), (0, 0), (1, 1))),
    "odd sizes": ((3, 100, 37, 51), 77, 3, ((1, 2), (2, 1), (2, 1))),
}


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not is_available("cuda"):
        pytest.skip("needs Triton and compute capability 8.0")


def make(shape, out_channels, kernel, dtype, scales):
    """x [B, C, H, W], `scales` activation scales under which some values saturate, weight, weight scale, bias."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    size = (out_channels, kernel, kernel, shape[1])
    weight = torch.randint(-127, 128, size, dtype=torch.int8, device="cuda", generator=generator)
    scale = torch.linspace(0.02, 0.03, scales, device="cuda")
    weight_scale, bias = torch.rand(2, out_channels, device="cuda", generator=generator)
    return x, scale, weight, weight_scale / 1000, bias.to(dtype)


def reference_sums(x, scale, weight, geometry):
    """The sums in float64, by a plain matrix product: other algorithms would round."""
    values = (x.float() / scale.reshape(-1, 1, 1, 1)).round().clamp(-127, 127).to(torch.int8).double()
    with torch.backends.cudnn.flags(enabled=False):
        return torch.nn.functional.conv2d(values, weight.permute(0, 3, 1, 2).double(), None, *geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "geometry"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact_and_scaled(shape, out_channels, kernel, geometry, dtype):
    x, scale, weight, weight_scale, bias = make(shape, out_channels, kernel, dtype, scales=shape[0])
    expected = reference_sums(x, scale, weight, geometry)
    assert torch.equal(conv2d_int8_sums(x, scale, weight, *geometry).double(), expected)
    out = conv2d_int8(x, scale, weight, weight_scale, bias, *geometry, dtype)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    expected = expected * scale.double()[:, None, None, None] * weight_scale.double()[:, None, None]
    expected += bias.double()[:, None, None]
    rtol = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantization_is_bit_exact(dtype):
    """Around every multiple of half a scale, where one bit decides the rounding."""
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64) + 1e-5
    halves = torch.arange(-260, 260) / 2 * scale[:, None]
    above, below = (torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (torch.inf, -torch.inf))
    x, scale = torch.stack([halves, above, below, -halves], dim=1)[..., None].to("cuda", dtype), scale.cuda()
    identity = torch.eye(4, dtype=torch.int8, device="cuda")[:, None, None, :]
    sums = conv2d_int8_sums(x, scale, identity, (1, 1), (0, 0), (1, 1))
    assert torch.equal(sums.float(), (x.float() / scale[:, None, None, None]).round().clamp(-127, 127))


def test_sums_at_the_extremes():
    x = torch.full((2, 2560, 8, 8), 127.0, device="cuda")
    weight = torch.full((64, 3, 3, 2560), -127, dtype=torch.int8, device="cuda")
    sums = conv2d_int8_sums(x, torch.ones(1, device="cuda"), weight, (1, 1), (0, 0), (1, 1))
    assert (sums == -127 * 127 * 9 * 2560).all()


def test_offsets_exceed_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs 12 GB of GPU memory")
    x, scale, weight, *_ = make((1, 64, 512, 512), 16, 3, torch.float16, scales=1)
    many = torch.empty((129, 64, 512, 512), dtype=x.dtype, device="cuda", memory_format=torch.channels_last)
    many[:-1].zero_()
    many[-1:] = x
    assert many.numel() > 2**31
    assert torch.equal(conv2d_int8_sums(many, scale, weight, *SAME)[-1:], conv2d_int8_sums(x, scale, weight, *SAME))


def test_runs_under_torch_compile():
    arguments = make((2, 32, 16, 16), 64, 3, torch.float16, scales=1)
    compiled = torch.compile(lambda *tensors: conv2d_int8(*tensors, *SAME, torch.float16), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), conv2d_int8(*arguments, *SAME, torch.float16))
