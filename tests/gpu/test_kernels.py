"""The Triton kernels on a GPU, at the sizes of diffusion models, compared with sums in float64. Run with `make test-gpu`."""

import pytest
import torch

from iec_core.quantization.kernels import launch, tiles
from iec_core.quantization.kernels.operators import conv2d_int8

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
    if not launch.is_available("cuda"):
        pytest.skip("needs Triton and compute capability 8.0")


def make(shape, out_channels, kernel, dtype):
    """Return x [B, C, H, W], weight, weight scale, bias."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    size = (out_channels, kernel, kernel, shape[1])
    weight = torch.randint(-127, 128, size, dtype=torch.int8, device="cuda", generator=generator)
    weight_scale, bias = torch.rand(2, out_channels, device="cuda", generator=generator)
    return x, weight, weight_scale / 1000, bias.to(dtype)


def given_scale():
    """Return a scale with which some values saturate."""
    return torch.tensor(0.02, device="cuda")


def dynamic_scale(x):
    return (x.float().flatten(1).abs().amax(1).cpu() / 127).cuda()  # a GPU multiplies by the reciprocal


def rounded(x, scale):
    """Round on the CPU, which divides as the IEEE standard says."""
    return (x.float().cpu() / scale.cpu().reshape(-1, 1, 1, 1)).round().clamp(-127, 127).to("cuda", torch.int8)


def reference_sums(x, scale, weight, geometry):
    """Return the sums in float64, by a plain matrix product: other algorithms would round."""
    with torch.backends.cudnn.flags(enabled=False):
        return torch.nn.functional.conv2d(rounded(x, scale).double(), weight.permute(0, 3, 1, 2).double(), None, *geometry)


def sums_of(x, given, weight, geometry, plan=None):
    values, scale = launch.quantized(x, given, False)
    return launch.conv2d(values, scale, weight, None, None, *geometry, torch.int32, False, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "out_channels", "kernel", "geometry"), SHAPES.values(), ids=SHAPES)
def test_sums_are_exact_and_scaled(shape, out_channels, kernel, geometry, channels_last, given, dtype):
    x, weight, weight_scale, bias = make(shape, out_channels, kernel, dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    given = given_scale() if given else None
    scale = dynamic_scale(x) if given is None else given.reshape(1)
    expected = reference_sums(x, scale, weight, geometry)
    assert torch.equal(sums_of(x, given, weight, geometry).double(), expected)
    out = conv2d_int8(x, given, False, weight, weight_scale, bias, *geometry, dtype)
    assert out.dtype == dtype and out.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    expected = expected * scale.double()[:, None, None, None] * weight_scale.double()[:, None, None]
    expected += bias.double()[:, None, None]
    rtol = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("channels", [320, 640, 100, 4])
def test_every_tile_and_split_of_the_reduction_loop_is_exact(channels):
    x, weight, *_ = make((2, channels, 24, 24), 320, 3, torch.float16)
    expected = reference_sums(x, dynamic_scale(x), weight, SAME)
    properties = torch.cuda.get_device_properties(0)
    for tile in tiles.tiles(10 * properties.major + properties.minor, channels):
        for splits in (1, 3, 9):
            assert torch.equal(sums_of(x, None, weight, SAME, (tile, splits)).double(), expected), (tile, splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_quantization_is_bit_exact(dtype):
    """The values are around every multiple of half a scale, where one bit decides the rounding."""
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 64) + 1e-5
    halves = torch.arange(-260, 260) / 2 * scale[:, None]
    above, below = (torch.nextafter(halves, torch.full_like(halves, limit)) for limit in (torch.inf, -torch.inf))
    for x, given in zip(
        torch.stack([halves, above, below, -halves], dim=1)[:, None, ..., None].to("cuda", dtype), scale.cuda()
    ):
        assert torch.equal(launch.quantized(x, given, False)[0].permute(0, 3, 1, 2), rounded(x, given))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("given", [False, True])
def test_linear_layers_with_few_rows(rows, given):
    """The reduction loop of such a layer is shared."""
    x, weight, *_ = make((rows, 1280, 1, 1), 1280, 1, torch.float16)
    geometry = (1, 1), (0, 0), (1, 1)
    given = given_scale() if given else None
    scale = dynamic_scale(x) if given is None else given.reshape(1)
    assert torch.equal(sums_of(x, given, weight, geometry).double(), reference_sums(x, scale, weight, geometry))


@pytest.mark.parametrize("given", [False, True])
def test_nan_and_infinity_give_nan_outputs(given):
    x, weight, weight_scale, _ = make((4, 64, 33, 31), 32, 3, torch.float16)
    x[1, 3, 30, 5], x[2, 60, 0, 0] = torch.nan, -torch.inf
    out = conv2d_int8(x, given_scale() if given else None, False, weight, weight_scale, None, *SAME, torch.float16)
    assert out[[1, 2]].isnan().all() and out[[0, 3]].isfinite().all()


def test_sums_at_the_extremes():
    x = torch.full((2, 2560, 8, 8), 127.0, device="cuda")
    weight = torch.full((64, 3, 3, 2560), -127, dtype=torch.int8, device="cuda")
    sums = sums_of(x, torch.ones(1, device="cuda"), weight, ((1, 1), (0, 0), (1, 1)))
    assert (sums == -127 * 127 * 9 * 2560).all()


def test_offsets_exceed_32_bits():
    if torch.cuda.get_device_properties(0).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GB of GPU memory")
    x, weight, weight_scale, _ = make((1, 64, 512, 512), 64, 3, torch.float16)
    many = torch.zeros((129, 64, 512, 512), dtype=x.dtype, device="cuda")
    many[-1:] = x
    assert many.numel() > 2**31
    one, all_ = (conv2d_int8(images, None, False, weight, weight_scale, None, *SAME, x.dtype) for images in (x, many))
    assert torch.equal(all_[-1:], one)


def test_runs_under_torch_compile():
    x, weight, weight_scale, bias = make((2, 32, 16, 16), 64, 3, torch.float16)

    def layer(x):
        return conv2d_int8(x, None, False, weight, weight_scale, bias, *SAME, torch.float16)

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
