"""Computations on a GPU, compared with the same definitions as on the CPU. Run with `make test-gpu`."""

import pytest
import torch

from iec_core.correction.iteration import CorrectionSettings, Step, corrected_denoised
from iec_core.quantization.fp8 import has_scaled_mm, linear_fp8
from iec_core.quantization.int8 import conv2d_int8, int_matmul, linear_int8
from iec_core.quantization.packing import Packing, WeightFormat, quantize_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (17, 31, 5), (300, 2880, 321), (16, 4096, 1280)])
def test_int_matmul_equals_int64(m, k, n):
    generator = torch.Generator().manual_seed(m)
    a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, generator=generator) for rows in (m, n))
    assert torch.equal(int_matmul(a.cuda(), b.cuda()).cpu().long(), a.long() @ b.long().t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotation", [0, 16])
def test_layers_agree_with_the_cpu(dtype, rotation):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 16, 12, 12, generator=generator).to(dtype), torch.randn(24, 144, generator=generator)
    values, scale = quantize_rows(weight, WeightFormat())
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    on_gpu = conv2d_int8(x.cuda(), values.cuda(), scale[:, 0].cuda(), None, *geometry)
    torch.testing.assert_close(on_gpu.cpu(), conv2d_int8(x, values, scale[:, 0], None, *geometry), rtol=1e-2, atol=1e-2)
    rows, (values, scale) = torch.randn(50, 64, generator=generator).to(dtype), quantize_rows(weight[:, :64], WeightFormat())
    for settings in ({}, {"per_tensor": True}, {"scale": torch.tensor(0.02)}):
        on_cpu = linear_int8(rows, values, scale[:, 0], None, rotation=rotation, **settings)
        moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in settings.items()}
        on_gpu = linear_int8(rows.cuda(), values.cuda(), scale[:, 0].cuda(), None, rotation=rotation, **moved)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=2e-2, atol=2e-2 * on_cpu.abs().max().item())


@pytest.mark.parametrize("compiled", [False, True])
def test_groups_of_two_scales_are_the_same_int8_as_on_the_cpu(compiled):
    packing = Packing((96, 256), WeightFormat("int4", 16, two_scales=True))
    packed = packing.quantize(torch.randn(96, 256, generator=torch.Generator().manual_seed(0)))
    (values, scale), unpack = packing.values(packed), torch.compile(packing.values) if compiled else packing.values
    on_gpu = unpack(packed.cuda())
    assert torch.equal(on_gpu[0].cpu(), values) and torch.equal(on_gpu[1].cpu(), scale)
    assert torch.equal(packing.quantize(packing.dequantize(packed).cuda()).cpu(), packing.quantize(packing.dequantize(packed)))


def test_float8_is_multiplied_by_its_definition():
    if not has_scaled_mm("cuda"):
        pytest.skip("this GPU does not multiply float8")
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 64), (32, 64), (32,)))
    packing = Packing((32, 64), WeightFormat("fp8"))
    values, scale = packing.values(packing.quantize(weight).cuda())
    result = linear_fp8(x.cuda().bfloat16(), values, scale[0], bias.cuda()).double().cpu()
    sx = x.bfloat16().abs().amax().float() / 448
    rounded = (x.bfloat16().float() / sx).to(torch.float8_e4m3fn).double() * sx.double()
    expected = rounded @ (values.double() * scale.double()).cpu().t() + bias.bfloat16().double()
    torch.testing.assert_close(result, expected, rtol=1e-2, atol=5e-2)


def test_one_iteration_never_waits_for_the_device():
    x, step = torch.randn(2, 4, 64, 64, device="cuda"), Step.euler(5.0, 4.0, 1.2)

    def iterate(iterations):
        settings = CorrectionSettings.parse("all", 0.5, iterations, 0.0)
        corrected_denoised(lambda x_in, sigma, iteration: 0.9 * x_in, x, step, settings)

    iterate(2)  # initialisation on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        iterate(1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            iterate(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
