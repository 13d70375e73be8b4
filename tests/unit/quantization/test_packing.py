"""The integer arithmetic compared with int64, and the quantizer with its definition."""

import types

import pytest
import torch
from meta_device import Copies

from iec_core.quantization import int8
from iec_core.quantization.fp8 import activation_scale
from iec_core.quantization.int8 import (
    conv2d_int8,
    conv2d_sums,
    conv_backend,
    dynamic_scale,
    int_matmul,
    linear_backend,
    linear_int8,
    quantize_activation,
)
from iec_core.quantization.packing import (
    LIMITS,
    Packing,
    WeightFormat,
    hadamard,
    pack_nibbles,
    quantize_rows,
    rotate,
    unpack_nibbles,
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


@pytest.mark.parametrize("uses_int_mm", [False, True])
def test_both_implementations_of_int_matmul_are_exact(monkeypatch, uses_int_mm):
    if uses_int_mm and not int8.has_exact_int_mm("cpu"):
        pytest.skip("this processor's torch._int_mm saturates")
    monkeypatch.setattr(int8, "uses_int_mm", lambda device: uses_int_mm)
    for a, b in [(random_int8(9, 5000), random_int8(4, 5000)), (torch.full((2, 2048), -127, dtype=torch.int8),) * 2]:
        assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long().t())


@pytest.mark.parametrize(("exact", "seconds", "used"), [(True, (1, 2), True), (True, (2, 1), False), (False, (1, 2), False)])
def test_the_faster_exact_implementation_is_used(monkeypatch, exact, seconds, used):
    taken = iter(seconds)
    monkeypatch.setattr(int8, "has_exact_int_mm", lambda device: exact)
    monkeypatch.setattr(int8, "_seconds", lambda compute: next(taken))
    assert int8.uses_int_mm.__wrapped__(torch.device("cpu")) == used
    assert int8.uses_int_mm.__wrapped__(torch.device("cuda")) == exact  # a clock would have to wait for the device


def rows(kernel):
    """Return a kernel [O, C, kh, kw] as the matrix with which it is computed, channels last."""
    return kernel.permute(0, 2, 3, 1).flatten(1).contiguous()


def convolution_int64(x, w, stride, padding, dilation):
    """Compute a convolution by its definition, written as sums."""
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
    sums = conv2d_sums(x, rows(w), w.shape[2:], stride, padding, dilation)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), convolution_int64(x, w, stride, padding, dilation))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_symmetric_per_output_channel(kind):
    weight = normal(6, 45) * torch.logspace(-3, 2, 6)[:, None]
    weight[3] = 0
    values, scale = quantize_rows(weight, WeightFormat(kind))
    limit = LIMITS[kind]
    assert limit == {"int8": 127, "int4": 7}[kind]
    expected = weight.abs().amax(1, keepdim=True) / limit
    torch.testing.assert_close(scale, torch.where(expected > 0, expected, 1.0), rtol=0, atol=0)
    nonzero = [0, 1, 2, 4, 5]
    assert values.abs().amax(1)[nonzero].tolist() == [limit] * 5
    assert ((values.double() * scale - weight).abs() <= scale * 0.5000001).all()


def test_each_group_has_its_own_scale():
    weight = normal(5, 96) * torch.logspace(-2, 2, 96)
    values, scale = quantize_rows(weight, WeightFormat("int4", group_size=32))
    assert scale.shape == (5, 3)
    for group in range(3):
        part = slice(32 * group, 32 * group + 32)
        expected = weight[:, part].abs().amax(1) / 7
        torch.testing.assert_close(scale[:, group], expected, rtol=0, atol=0)
        assert torch.equal(values[:, part], (weight[:, part] / expected[:, None]).round().to(torch.int8))


def test_search_finds_the_scale_of_least_error():
    """The reference is a search in float64 over many more clipping ranges; with heavy tails, clipping pays."""
    weight = normal(8, 400) ** 3
    searched, plain = (quantize_rows(weight, WeightFormat("int4", search=search)) for search in (True, False))
    rows64 = weight.double()

    def error(values, scale):
        return (values.double() * scale.double() - rows64).square().sum(1)

    best = torch.full((8,), float("inf"), dtype=torch.float64)
    for share in torch.linspace(1, 0.2, 801, dtype=torch.float64):
        scale = rows64.abs().amax(1, keepdim=True) / 7 * share
        best = torch.minimum(best, error((rows64 / scale).round().clamp(-7, 7), scale))
    assert (error(*searched) <= 1.02 * best).all()
    assert error(*searched).sum() < 0.9 * error(*plain).sum()


def test_fp8_is_the_nearest_e4m3_with_one_scale():
    weight = normal(4, 64)
    values, scale = quantize_rows(weight, WeightFormat("fp8"))
    assert values.dtype == torch.float8_e4m3fn and scale.unique().tolist() == [pytest.approx(weight.abs().max().item() / 448)]
    error = (values.double() * scale.double() - weight).abs()
    assert (error <= weight.abs() / 16 + scale * 2**-10).all()  # three bits of mantissa; the smallest step is 2^-9


def test_hadamard_is_orthogonal_and_rotations_cancel():
    """The regular Hadamard matrix has entries of one magnitude and equal row sums; H H = 1, because it is symmetric."""
    for size in (4, 16, 64, 256):
        matrix = hadamard(size).double()
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64))
        assert torch.equal(matrix, matrix.t()) and matrix.abs().unique().numel() == 1
        assert matrix.sum(1).std() < 1e-6
    x, weight = normal(3, 128), normal(5, 128, seed=1)
    torch.testing.assert_close(rotate(x, 64) @ rotate(weight, 64).t(), x @ weight.t(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(32)


def test_rotation_lowers_the_error_of_outliers():
    weight = normal(16, 256)
    weight[:, 7] *= 30
    errors = [
        (Packing((16, 256), fmt).dequantize(Packing((16, 256), fmt).quantize(weight)) - weight).norm()
        for fmt in (WeightFormat("int4"), WeightFormat("int4", rotation=256))
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("inputs", [1, 2, 7, 64])
def test_packed_nibbles_are_unpacked_exactly(inputs):
    values = torch.randint(-7, 8, (9, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(inputs))
    packed = pack_nibbles(values)
    assert packed.dtype == torch.uint8 and packed.shape == (9, -(-inputs // 2))
    assert torch.equal(unpack_nibbles(packed, inputs), values)


@pytest.mark.parametrize("shape", [(24, 64), (7, 5, 3, 3), (3, 33), (16, 256)])
@pytest.mark.parametrize(
    "fmt",
    [
        WeightFormat("int8"), WeightFormat("int4"), WeightFormat("fp8"), WeightFormat("int4", group_size=32),
        WeightFormat("int8", group_size=64, search=True), WeightFormat("int8", rotation=64),
    ],
)  # fmt: skip
def test_packing_holds_a_weight_in_one_tensor(shape, fmt):
    weight = normal(*shape)
    packing = Packing(shape, fmt)
    packed = packing.quantize(weight)
    count = weight.numel()
    assert packed.dtype == torch.int8 and packed.shape == (packing.nbytes,)
    bits = {"int8": 8, "int4": 4, "fp8": 8}[fmt.kind]
    odd = shape[0] if fmt.kind == "int4" and packing.inputs % 2 else 0
    assert (
        count * bits / 8 + 4 * shape[0] * packing.groups
        <= packing.nbytes
        < count * bits / 8 + odd + 4 * shape[0] * packing.groups + 16
    )
    restored = packing.dequantize(packed)
    assert restored.shape == weight.shape and restored.dtype == torch.float32
    assert (restored - weight).norm() < {"int8": 0.02, "int4": 0.2, "fp8": 0.04}[fmt.kind] * weight.norm()
    assert torch.equal(packing.quantize(restored), packed) or fmt.kind != "int8" or packing.format.rotation or fmt.search
    values, scale = packing.values(packed)
    matrix = weight if len(shape) == 2 else rows(weight)
    if packing.format.rotation:
        matrix = rotate(matrix, packing.format.rotation)
    expected, expected_scale = quantize_rows(matrix, packing.format)
    assert torch.equal(values.float(), expected.float()) and torch.equal(scale, expected_scale)
    torch.testing.assert_close(
        packing.scaled(packed), (values.float().unflatten(1, (packing.groups, -1)) * scale[..., None]).flatten(1)
    )


def test_groups_and_rotation_are_omitted_if_the_shape_does_not_allow_them():
    assert Packing((4, 48), WeightFormat("int4", group_size=32)).format.group_size == 0
    assert Packing((4, 48), WeightFormat("int8", rotation=64)).format.rotation == 0
    assert Packing((4, 16, 3, 3), WeightFormat("int8", rotation=16)).format.rotation == 0


def test_linear_is_the_integer_sum_times_both_scales():
    x, weight, bias = normal(2, 3, 40), normal(24, 40, seed=1), normal(24, seed=2)
    values, scale = quantize_rows(weight, WeightFormat())
    for per_tensor in (False, True):
        sx = (x.abs().amax() if per_tensor else x.abs().amax(-1)) / 127
        sx = sx.expand(2, 3)
        xq = (x / sx[..., None]).round().long()
        expected = (xq @ values.long().t()).double() * sx[..., None].double() * scale[:, 0].double() + bias
        result = linear_int8(x, values, scale[:, 0], bias, per_tensor=per_tensor)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_convolution_is_the_integer_sum_times_both_scales(kernel, stride, padding, dilation, given):
    """A 1 x 1 window has a scale for each pixel, a larger window one for each batch item; or the scale is given."""
    x, weight, bias = normal(2, 5, 11, 9), normal(7, 5, kernel, kernel, seed=1), normal(7, seed=2)
    values, scale = quantize_rows(rows(weight), WeightFormat("int4"))
    sx = (x.abs().amax(1, keepdim=True) if kernel == 1 else x.abs().amax((1, 2, 3), keepdim=True)) / 127
    sx = torch.full_like(sx, 0.011) if given else sx
    kernels = values.view(7, kernel, kernel, 5).permute(0, 3, 1, 2)
    xq = (x / sx).round().clamp(-127, 127)
    sums = convolution_int64(xq, kernels, stride, padding, dilation).double()
    expected = sums * sx.double() * scale.double()[:, 0, None, None] + bias[:, None, None]
    taken = torch.tensor(0.011) if given else None
    result = conv2d_int8(x, values, scale[:, 0], bias, weight.shape[2:], stride, padding, dilation, taken)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


def test_activation_scales_do_not_depend_on_neighbours():
    x = normal(3, 4, 6, 6, seed=3)
    values, scale = quantize_rows(normal(8, 36), WeightFormat())
    assert torch.equal(dynamic_scale(x, True), torch.cat([dynamic_scale(item[None], True) for item in x]))
    assert dynamic_scale(torch.zeros(2, 3), True).unique().tolist() == [1.0]
    broken = x.clone()
    broken[1, 2, 3, 3] = torch.nan
    found = conv2d_int8(broken, values, scale[:, 0], None, (3, 3), (1, 1), (1, 1), (1, 1))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    assert quantize_activation(torch.tensor([300.0, -300.0, 0.6]), torch.tensor(1.0)).tolist() == [127, -127, 1]
    together, alone = (conv2d_int8(batch, values, scale[:, 0], None, (3, 3), (1, 1), (1, 1), (1, 1)) for batch in (x, x[1:2]))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.02), torch.tensor([0.02])])
def test_nan_and_infinity_give_nan_outputs(scale, per_tensor, wrong):
    """Integers have no NaN or infinity, so the output must be NaN; other items are affected only if they share the scale."""
    values, scales = quantize_rows(normal(8, 36), WeightFormat())
    apart = scale is not None or not per_tensor
    x = normal(3, 2, 36, seed=3)
    x[1, 0, 5] = wrong
    found = linear_int8(x, values, scales[:, 0], normal(8), scale, per_tensor)
    assert found[1, 0].isnan().all() and found[[0, 2]].isfinite().all() == apart
    for kernel, inputs in ((3, 4), (1, 36)):
        image = normal(3, inputs, 6, 6, seed=4)
        image[1, 2, 3, 3] = wrong
        geometry = (kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1)
        found = conv2d_int8(image, values, scales[:, 0], normal(8), *geometry, scale, per_tensor)
        assert found[1, :, 3, 3].isnan().all() and found[[0, 2]].isfinite().all() == apart


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_float8_scale_of_non_finite_inputs_is_not_finite(wrong):
    rows, scale = normal(2, 16), torch.tensor(0.02)
    assert activation_scale(rows, scale) == scale
    rows[1, 3] = wrong
    assert activation_scale(rows, scale).isnan() and not activation_scale(rows).isfinite()


def test_an_infinity_in_half_precision_gives_nan():
    """The largest finite numbers, whose differences would overflow, are not treated as infinity."""
    values, scale = quantize_rows(normal(8, 16), WeightFormat())
    x = torch.full((2, 16), -65504.0).half()
    x[0, 0], x[1, 0] = 65504, torch.inf
    found = linear_int8(x, values, scale[:, 0], None, torch.tensor(1000.0)).float()
    assert not found[0].isnan().any() and found[1].isnan().all()


def test_half_precision_is_kept():
    values, scale = quantize_rows(normal(8, 16), WeightFormat())
    assert linear_int8(normal(2, 16).half(), values, scale[:, 0], torch.zeros(8).half()).dtype == torch.float16


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kitchen_computes_the_same(monkeypatch, dtype, rotation):
    """The kernel is comfy-kitchen's eager one, which is used on a GPU if there is no faster one."""
    monkeypatch.setattr(int8, "linear_backend", lambda *_: int8.KITCHEN)
    x, bias = normal(2, 5, 64).to(dtype), normal(24, seed=2).to(dtype)
    values, scale = quantize_rows(normal(24, 64, seed=1), WeightFormat())
    result = linear_int8(x, values, scale[:, 0], bias, rotation=rotation)
    rows64 = x.double().flatten(0, 1)
    rows64 = (rows64.unflatten(1, (-1, rotation)) @ hadamard(rotation).double()).flatten(1) if rotation else rows64
    sx = rows64.abs().amax(1, keepdim=True) / 127
    expected = ((rows64 / sx).round() @ values.double().t()) * sx * scale[:, 0].double() + bias.double()
    tolerance = 1e-4 if dtype == torch.float32 and not rotation else 2e-2
    torch.testing.assert_close(result.double().flatten(0, 1), expected, rtol=tolerance, atol=tolerance * 10)
    assert result.dtype == dtype and result.shape == (2, 5, 24)


@pytest.fixture
def gpu(monkeypatch):
    """Return gpu(kitchen, triton), which sets which of the two a GPU has."""

    def has(kitchen, triton):
        monkeypatch.setattr(int8, "has_kitchen", lambda device: kitchen and torch.device(device).type == "cuda")
        monkeypatch.setattr(int8.launch, "is_available", lambda device: triton and torch.device(device).type == "cuda")
        monkeypatch.setattr(int8, "uses_int_mm", lambda device: True)

    return has


@pytest.mark.parametrize(("triton", "else_"), [(True, int8.TRITON), (False, "torch._int_mm")])
def test_comfy_kitchen_gets_only_sizes_that_its_kernels_support(gpu, triton, else_):
    """Its CUDA kernels do not check the sizes."""
    gpu(kitchen=True, triton=triton)
    taken = {(outputs, inputs): linear_backend("cuda", True, outputs, inputs) for outputs in (8, 17, 24) for inputs in (48, 40)}
    assert {sizes for sizes, name in taken.items() if name == int8.KITCHEN} == {(8, 48), (24, 48)}
    assert {name for name in taken.values() if name != int8.KITCHEN} == {else_}
    assert linear_backend("cpu", True, 8, 48) == "torch._int_mm" and linear_backend("cuda", False, 8, 48) == else_
    gpu(kitchen=False, triton=triton)
    assert linear_backend("cuda", True, 8, 48) == else_


def test_float32_products_are_used_on_cpus_only(monkeypatch):
    """On other devices the dequantized weight is faster, and is multiplied in half precision."""
    monkeypatch.setattr(int8, "uses_int_mm", lambda device: False)
    assert linear_backend("cpu", True, 8, 48) == int8.FLOAT_PRODUCTS and linear_backend("mps", True, 8, 48) == int8.WEIGHT_ONLY


def test_windows_are_gathered_on_cpus_only(gpu):
    gpu(kitchen=True, triton=False)
    assert conv_backend("cuda") == conv_backend("mps") == int8.WEIGHT_ONLY
    assert linear_backend("cuda", False, 8, 48) == int8.INT_MM
    assert conv_backend("cpu") == "gathered windows, torch._int_mm"
    gpu(kitchen=True, triton=True)
    assert conv_backend("cuda") == int8.TRITON


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_layer_waits_for_no_device(kind, given):
    """It also copies nothing to the device."""
    packing = Packing((8, 5, 3, 3), WeightFormat(kind))
    values, scale = packing.values(packing.quantize(normal(8, 5, 3, 3)).to("meta"))
    given = torch.tensor(0.1, device="meta") if given else None
    x, rows, bias = normal(2, 5, 6, 6).to("meta"), normal(7, 45).to("meta"), normal(8).to("meta")
    int8.conv_backend("meta"), int8.linear_backend("meta", given is None, 8, 45)  # decided on first use
    with Copies() as copies:
        for per_tensor in (False, True):
            more = given, per_tensor
            assert int8.linear_int8(rows, values, scale[:, 0], bias, *more, backend=int8.FLOAT_PRODUCTS).shape == (7, 8)
            geometry = (3, 3), (1, 1), (1, 1), (1, 1)
            image = conv2d_int8(x, values, scale[:, 0], bias, *geometry, *more, backend=int8.FLOAT_PRODUCTS)
            assert image.shape == (2, 8, 6, 6) and image.device.type == "meta"
    assert copies.count == 0


class TestKitchen:
    """Queries to comfy-kitchen's registry, which knows what is installed and what the host has disabled."""

    BACKENDS = {
        "eager": {"available": True, "disabled": False, "capabilities": ["int8_linear"]},
        "cuda": {"available": True, "disabled": False, "capabilities": ["int8_linear", "adaln"]},
        "triton": {"available": False, "disabled": False, "capabilities": []},
    }

    @pytest.fixture
    def asked(self, monkeypatch):
        def ask(**cuda):
            known = {**self.BACKENDS, "cuda": {**self.BACKENDS["cuda"], **cuda}}
            monkeypatch.setattr(int8.kitchen, "list_backends", lambda: known)
            return int8.has_kitchen.__wrapped__(torch.device("cuda"))

        return ask

    def test_only_a_compiled_kernel_of_comfy_kitchen_counts(self, asked):
        assert asked() and not asked(available=False) and not asked(disabled=True) and not asked(capabilities=["adaln"])

    def test_comfy_kitchen_on_other_devices_or_missing(self, monkeypatch):
        assert not int8.has_kitchen("cpu")
        monkeypatch.setattr(int8, "kitchen", None)
        assert not int8.has_kitchen.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_packed_weight_may_be_part_of_a_larger_buffer(kind):
    """The host has such buffers for weights that are moved to a GPU on demand."""
    packing = Packing((7, 48), WeightFormat(kind, group_size=16))
    packed = packing.quantize(normal(7, 48))
    buffer = torch.full((packed.numel() + 64,), 77, dtype=torch.int8)
    buffer[32 : 32 + packed.numel()] = packed
    part = buffer[32 : 32 + packed.numel()]
    for found, expected in zip(
        (*packing.stored(part), packing.dequantize(part)), (*packing.stored(packed), packing.dequantize(packed))
    ):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    packing.stored(part)[1].fill_(1.0)
    assert torch.equal(packing.stored(part)[1], torch.ones(7, packing.groups)) and (buffer[32 + packed.numel() :] == 77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_weight_is_rounded_once(kind, dtype):
    packing = Packing((6, 64), WeightFormat(kind, group_size=16))
    packed = packing.quantize(normal(6, 64))
    values, scale = packing.values(packed)
    expected = (values.float().unflatten(1, (packing.groups, -1)) * scale[..., None]).flatten(1).to(dtype)
    assert torch.equal(packing.scaled(packed, dtype), expected)


def test_comfy_kitchen_gets_neither_empty_nor_float64_inputs(monkeypatch):
    monkeypatch.setattr(int8, "linear_backend", lambda *_: int8.KITCHEN)
    values, scale = quantize_rows(normal(8, 16), WeightFormat())
    assert linear_int8(torch.zeros(0, 16), values, scale[:, 0], None).shape == (0, 8)
    found = linear_int8(normal(2, 16).double(), values, scale[:, 0], None)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), linear_int8(normal(2, 16), values, scale[:, 0], None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_is_detected_after_a_kernel_that_ignores_it(monkeypatch, wrong):
    """comfy-kitchen's CUDA kernel does this: it turns NaN and infinity into numbers."""
    kernel = int8.comfy_kitchen.int8_linear
    blind = types.SimpleNamespace(int8_linear=lambda rows, *more: kernel(rows.nan_to_num(0), *more))
    monkeypatch.setattr(int8, "linear_backend", lambda *_: int8.KITCHEN)
    monkeypatch.setattr(int8, "comfy_kitchen", blind)
    values, scale = quantize_rows(normal(8, 16), WeightFormat())
    x = normal(4, 16)
    expected = kernel(x, values, scale[:, 0], None, torch.float32)
    torch.testing.assert_close(linear_int8(x, values, scale[:, 0], None), expected, rtol=0, atol=0)
    x[1, 3] = wrong
    assert linear_int8(x, values, scale[:, 0], None)[1].isnan().all()


def test_a_compiled_layer_asks_for_comfy_kitchens_operator(monkeypatch):
    """The layer is one graph, because the compiler does not trace into the operator."""
    monkeypatch.setattr(int8, "linear_backend", lambda *_: int8.KITCHEN)
    values, scale = quantize_rows(normal(8, 16), WeightFormat())
    compiled = torch.compile(linear_int8, backend="eager", fullgraph=True)
    x = normal(2, 3, 16)
    torch.testing.assert_close(compiled(x, values, scale[:, 0], None), linear_int8(x, values, scale[:, 0], None))


@pytest.mark.parametrize("given", [None, torch.tensor(0.1)])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_empty_inputs_give_empty_outputs(per_tensor, given):
    values, scale = quantize_rows(normal(8, 36), WeightFormat())
    assert linear_int8(torch.zeros(0, 36), values, scale[:, 0], None, given, per_tensor).shape == (0, 8)
    geometry = (3, 3), (1, 1), (1, 1), (1, 1)
    empty = conv2d_int8(torch.zeros(0, 4, 6, 6), values, scale[:, 0], None, *geometry, given, per_tensor)
    assert empty.shape == (0, 8, 6, 6)
