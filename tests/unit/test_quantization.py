"""The integer arithmetic against int64, and the quantizer against its definition."""

import pytest
import torch

from iec_core import quantization
from iec_core.quantization import (
    conv2d_int8,
    conv2d_sums,
    int_matmul,
    linear_int8,
    quantize_activation,
    quantize_weight,
)


def random_int8(*shape, limit=127):
    return torch.randint(-limit, limit + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 7, 5), (33, 320, 17), (64, 2880, 64), (1, 4096, 1280)])
def test_int_matmul_equals_int64(m, k, n):
    a, b = random_int8(m, k), random_int8(n, k)
    result = int_matmul(a, b)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), a.long() @ b.long().t())


def test_int_matmul_at_the_extremes():
    a = torch.full((20, 8192), -127, dtype=torch.int8)
    assert torch.equal(int_matmul(a, a).long(), torch.full((20, 20), 127 * 127 * 8192))


def test_fallback_of_int_matmul_is_exact(monkeypatch):
    monkeypatch.setattr(quantization, "_has_exact_int_mm", lambda device: False)
    for a, b in [(random_int8(9, 5000), random_int8(4, 5000)), (torch.full((2, 2048), -127, dtype=torch.int8),) * 2]:
        assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().t())


def convolution_int64(x, w, stride, padding, dilation):
    """The definition of a convolution, written as its sums."""
    x = torch.nn.functional.pad(x.long(), (padding[1],) * 2 + (padding[0],) * 2)
    kh, kw = w.shape[2:]
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    out = torch.zeros(x.shape[0], w.shape[0], height, width, dtype=torch.int64)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
            out += torch.einsum("bchw,oc->bohw", x[:, :, rows, columns], w[:, :, i, j].long())
    return out


CONVOLUTIONS = [
    (3, (1, 1), (1, 1), (1, 1)),
    (1, (1, 1), (0, 0), (1, 1)),
    (3, (2, 2), (1, 1), (1, 1)),
    (3, (1, 2), (2, 1), (2, 1)),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_convolution_sums_equal_int64(kernel, stride, padding, dilation):
    x, w = random_int8(2, 5, 11, 9), random_int8(7, 5, kernel, kernel)
    sums = conv2d_sums(x, w, stride, padding, dilation)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), convolution_int64(x, w, stride, padding, dilation))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_symmetric_per_output_channel(bits):
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6)[:, None, None, None]
    weight[3] = 0
    quantized = quantize_weight(weight, bits)
    limit = 2 ** (bits - 1) - 1
    expected = weight.flatten(1).abs().amax(1) / limit
    torch.testing.assert_close(quantized.scale, torch.where(expected > 0, expected, 1.0), rtol=0, atol=0)
    nonzero = [0, 1, 2, 4, 5]
    assert quantized.values.flatten(1).abs().amax(1)[nonzero].tolist() == [limit] * 5
    error = (quantized.dequantize(torch.float64) - weight).abs()
    assert (error <= quantized.scale[:, None, None, None] * 0.5000001).all()


def test_linear_is_the_integer_sum_times_both_scales():
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(2, 3, 40), (24, 40), (24,)])
    quantized = quantize_weight(weight, 8)
    sx = x.abs().amax(-1) / 127
    xq = (x / sx[..., None]).round().long()
    expected = (xq @ quantized.values.long().t()).double() * sx[..., None].double() * quantized.scale.double() + bias
    torch.testing.assert_close(linear_int8(x, quantized, bias).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_convolution_is_the_integer_sum_times_both_scales(kernel, stride, padding, dilation):
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in [(2, 5, 11, 9), (7, 5, kernel, kernel), (7,)])
    quantized = quantize_weight(weight, 4)
    sx = (x.flatten(1).abs().amax(1) / 127)[:, None, None, None]
    sums = convolution_int64((x / sx).round(), quantized.values, stride, padding, dilation).double()
    expected = sums * sx.double() * quantized.scale.double()[:, None, None] + bias[:, None, None]
    result = conv2d_int8(x, quantized, bias, stride, padding, dilation)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_activation_scales_do_not_depend_on_neighbours():
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    values, scale = quantize_activation(x)
    alone = [quantize_activation(item[None]) for item in x]
    assert torch.equal(values, torch.cat([v for v, _ in alone]))
    assert torch.equal(scale, torch.cat([s for _, s in alone]))
    weight = quantize_weight(torch.randn(8, 4, 3, 3), 8)
    together = conv2d_int8(x, weight, None, (1, 1), (1, 1), (1, 1))
    assert torch.equal(together[1:2], conv2d_int8(x[1:2], weight, None, (1, 1), (1, 1), (1, 1)))


def test_half_precision_stays_half():
    weight = quantize_weight(torch.randn(8, 16), 8)
    assert linear_int8(torch.randn(2, 16).half(), weight, torch.zeros(8).half()).dtype == torch.float16
