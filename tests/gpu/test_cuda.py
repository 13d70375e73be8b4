"""What a GPU computes, against the same definitions as on the CPU. Run with `make test-gpu`."""

import pytest
import torch

from iec_core.correction import CorrectionSettings, Step, corrected_denoised
from iec_core.quantization import conv2d_int8, int_matmul, linear_int8, quantize_weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (17, 31, 5), (300, 2880, 321), (16, 4096, 1280)])
def test_int_matmul_equals_int64(m, k, n):
    generator = torch.Generator().manual_seed(m)
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
    assert torch.equal(int_matmul(a.cuda(), b.cuda()).cpu().long(), a.long() @ b.long().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layers_agree_with_the_cpu(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 16, 12, 12, generator=generator).to(dtype), torch.randn(24, 16, 3, 3, generator=generator)
    quantized, geometry = quantize_weight(weight, 8), ((1, 1), (1, 1), (1, 1))
    on_gpu = conv2d_int8(x.cuda(), quantize_weight(weight.cuda(), 8), None, *geometry)
    torch.testing.assert_close(on_gpu.cpu(), conv2d_int8(x, quantized, None, *geometry), rtol=1e-2, atol=1e-2)
    rows, matrix = x.flatten(0, 2), torch.randn(8, 12, generator=generator)
    on_gpu = linear_int8(rows.cuda(), quantize_weight(matrix.cuda(), 8), None)
    torch.testing.assert_close(on_gpu.cpu(), linear_int8(rows, quantize_weight(matrix, 8), None), rtol=1e-2, atol=1e-2)


def test_one_iteration_never_waits_for_the_device():
    x, step = torch.randn(2, 4, 64, 64, device="cuda"), Step.euler(5.0, 4.0, 1.2)

    def iterate(iterations):
        settings = CorrectionSettings.parse("all", 0.5, iterations, 0.0)
        corrected_denoised(lambda x_in, sigma, iteration: 0.9 * x_in, x, step, settings)

    iterate(2)  # whatever is set up at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        iterate(1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            iterate(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
