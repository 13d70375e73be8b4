"""GPTQ and the low-rank branch, compared with the published recurrence, brute force, and singular values in float64."""

import itertools
import math

import pytest
import torch

from iec_core.quantization import gptq as core
from iec_core.quantization.gptq import (
    DAMPING,
    DAMPING_OF_FEW,
    Metric,
    Moments,
    calibrated_weight,
    fitted,
    gptq,
    low_rank,
    sampled_rows,
    sampled_windows,
)
from iec_core.quantization.packing import LIMITS, Packing, WeightFormat, rotate, rounded, rounded_like


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(count, size, seed=1):
    """Return x [count, size], float32, with a mean, of correlated channels of different sizes."""
    mixed = normal(count, size, seed=seed) @ (torch.eye(size) + 0.5 * normal(size, size, seed=seed + 1) / math.sqrt(size))
    return (mixed + 0.3) * torch.linspace(0.2, 2, size)


def moments_of(x, most=10**6):
    moments = Moments(x.shape[1], most, "cpu")
    for part in x.split(100):
        moments.take_up(part)
    return moments


def damped(x):
    """Return the damped second moments of x [N, K], float64 [K, K]."""
    second = x.double().t() @ x.double() / len(x)
    damping = DAMPING + DAMPING_OF_FEW * len(second) / len(x)
    return second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)


def cost(rows, matrix):
    """Return the squared errors [O] of rows [O, K] in a metric."""
    rows = rows.double()
    return (rows @ matrix * rows).sum(1)


def published(rows, scale, limit, matrix):
    """Run GPTQ as in its Algorithm 1 (arXiv 2210.17323), one column at a time, by the Cholesky factor of the inverse;
    float64.
    """
    order = matrix.diagonal().argsort(descending=True, stable=True)
    weight, inverse = rows.double()[:, order].clone(), torch.linalg.inv(matrix[order][:, order])
    upper = torch.linalg.cholesky(inverse).t()
    values = torch.empty_like(weight)
    for column in range(weight.shape[1]):
        values[:, column] = (weight[:, column] / scale[:, 0].double()).round().clamp(-limit, limit)
        error = (weight[:, column] - values[:, column] * scale[:, 0]) / upper[column, column]
        weight[:, column:] -= error[:, None] * upper[column, column:]
    return values[:, order.argsort()]


@pytest.mark.parametrize("columns", [128, 7])  # of a block
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gptq_equals_the_published_recurrence(monkeypatch, kind, columns):
    monkeypatch.setattr(core, "COLUMNS", columns)
    x, rows = inputs(500, 30), normal(40, 30)
    limit = LIMITS[kind]
    scale = rows.abs().amax(1, keepdim=True) * 0.9 / limit
    values, _ = gptq(rows, scale, WeightFormat(kind), Metric(moments_of(x)))
    expected = published(rows, scale, limit, damped(x))
    assert (values == expected).float().mean() == 1
    nearest = (rows / scale).round().clamp(-limit, limit)
    assert (values != nearest).float().mean() > 0.1


def test_errors_equal_those_of_the_output():
    x, rows = inputs(500, 30), normal(12, 30)
    scale = rows.abs().amax(1, keepdim=True) / 7
    metric = Metric(moments_of(x))
    values, errors = gptq(rows, scale, WeightFormat("int4"), metric)
    left = rows - values * scale
    torch.testing.assert_close(errors.double(), cost(left, damped(x)), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(metric.of(left).square().sum(1), errors, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(metric.undone(metric.of(left)), left, rtol=1e-3, atol=1e-5)
    output = x.double() @ left.double().t()
    assert (output.square().mean(0) < errors).all()  # the errors include the damping
    assert (output.square().mean(0) > 0.8 * errors).all()


def test_gptq_is_near_the_brute_force_optimum():
    x, rows = inputs(300, 4), normal(24, 4, seed=5)
    matrix, scale = damped(x), rows.abs().amax(1, keepdim=True) / 7
    values, _ = gptq(rows, scale, WeightFormat("int4"), Metric(moments_of(x)))
    grid = torch.tensor(list(itertools.product(range(-7, 8), repeat=4)), dtype=torch.float64)
    least = torch.stack([cost(row - grid * step, matrix).amin() for row, step in zip(rows.double(), scale.double())])
    found = cost(rows.double() - values.double() * scale.double(), matrix)
    nearest = cost(rows - (rows / scale).round() * scale, matrix)
    assert (found >= least * (1 - 1e-6)).all()
    assert found.sum() < 1.3 * least.sum() < 1.5 * nearest.sum()
    assert (found < least * 1.001).float().mean() > 0.5


def test_without_correlations_values_are_rounded_to_nearest():
    rows, x = normal(9, 16), torch.eye(16).repeat(4, 1) * torch.linspace(1, 3, 16)
    scale = rows.abs().amax(1, keepdim=True) / 7
    values, _ = gptq(rows, scale, WeightFormat("int4"), Metric(moments_of(x)))
    assert torch.equal(values, (rows / scale).round())


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_each_row_has_the_clipping_range_of_least_error(monkeypatch, kind, group_size):
    group_size = group_size if kind != "fp8" else 0
    monkeypatch.setattr(core, "LEAST_ELEMENTS", 2000)  # rows in several parts
    x, rows = inputs(500, 24), normal(37, 24)
    metric = Metric(moments_of(x))
    values, scale = fitted(rows, WeightFormat(kind, group_size), metric)
    groups = rows.unflatten(1, (-1, group_size)) if group_size else rows[:, None]
    widest = (rows if kind == "fp8" else groups).abs()
    widest = (widest.amax().expand(37, 1) if kind == "fp8" else widest.amax(-1)) / LIMITS[kind]
    tried = [(gptq(rows, widest * share, WeightFormat(kind), metric), widest * share) for share in core.SHARES[kind]]
    errors = torch.stack([errors for (_, errors), _ in tried])
    for row, best in enumerate(errors.argmin(0).tolist()):
        (expected, _), of_scale = tried[best]
        assert torch.equal(values[row], expected[row]) and torch.equal(scale[row], of_scale[row])
    assert kind != "int4" or len(set(errors.argmin(0).tolist())) > 1
    assert values.abs().amax() <= LIMITS[kind]


@pytest.mark.parametrize("shape", [(12, 30), (40, 20)])
def test_low_rank_error_equals_the_remaining_singular_values(shape):
    x, rows = inputs(500, shape[1]), normal(*shape)
    out, into = low_rank(rows, Metric(moments_of(x)), 5)
    assert out.shape == (shape[0], 5) and into.shape == (5, shape[1])
    matrix = damped(x)
    singular = torch.linalg.svdvals(rows.double() @ torch.linalg.cholesky(matrix))
    torch.testing.assert_close(cost(rows - out @ into, matrix).sum(), singular[5:].square().sum(), rtol=1e-3, atol=0)
    plain_out, sizes, plain_into = torch.linalg.svd(rows.double(), full_matrices=False)
    plain = plain_out[:, :5] * sizes[:5] @ plain_into[:5]
    assert singular[5:].square().sum() < 0.9 * cost(rows - plain, matrix).sum()
    torch.testing.assert_close(out.norm(dim=0), into.norm(dim=1))


def output_error(weight, packing, packed, x):
    """Return the relative mean squared error of a packed weight's output over x [N, K]."""
    rows, full = packing.matrix(packing.dequantize(packed)).double(), packing.matrix(weight).double()
    return ((x.double() @ (rows - full).t()).square().mean() / (x.double() @ full.t()).square().mean()).item()


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("shape", [(48, 64), (24, 16, 2, 2)])
def test_a_calibrated_weight_keeps_the_output(shape, rotation):
    x, weight = inputs(2000, 64), normal(*shape) / 8
    errors = {}
    for rank in (0, 4, 16):
        packing = Packing(shape, WeightFormat("int4", rotation=rotation, calibrated=True, rank=rank))
        moments = moments_of(packing.rotated(x))
        packed = calibrated_weight(weight, packing, moments)
        assert packed.dtype == torch.int8 and packed.shape == (packing.nbytes,)
        errors[rank] = output_error(weight, packing, packed, x)
    nearest = Packing(shape, WeightFormat("int4", rotation=rotation))
    assert errors[0] < 0.75 * output_error(weight, nearest, nearest.quantize(weight), x)
    assert errors[16] < 0.6 * errors[4] < 0.6 * 0.9 * errors[0]


def test_layers_with_few_samples_or_zero_inputs_are_accepted():
    weight, packing = normal(8, 64), Packing((8, 64), WeightFormat("int4", calibrated=True, rank=2))
    for x in (inputs(3, 64), torch.zeros(5, 64), inputs(400, 64) * (torch.arange(64) < 20)):
        back = packing.dequantize(calibrated_weight(weight, packing, moments_of(x)))
        assert back.isfinite().all()
        assert (back - weight).norm() < 0.5 * weight.norm()


def test_damping_grows_until_the_factorization_succeeds():
    sick = torch.diag(torch.tensor([1.0, 1.0, -0.3]))
    factor = core._upper_factor(sick.clone(), 0.01)
    assert torch.equal(factor, factor.triu())
    added = (factor @ factor.t() - sick).diagonal()
    assert added[0] > 0.3 and torch.allclose(added, added[0].expand(3))


def test_large_layers_have_block_diagonal_moments():
    x, rows = inputs(300, 50), normal(10, 50)
    moments = moments_of(x, most=20)
    assert [len(product) for product in moments.products] == [16, 17, 17]
    second, start = x.double().t() @ x.double(), 0
    apart = torch.zeros(50, 50, dtype=torch.float64)
    for product in moments.products:
        part = slice(start, start := start + len(product))
        torch.testing.assert_close(product.double(), second[part, part], rtol=1e-5, atol=1e-4)
        block = second[part, part] / 300
        damping = DAMPING + DAMPING_OF_FEW * len(block) / 300
        apart[part, part] = block + damping * block.diagonal().mean() * torch.eye(len(block), dtype=torch.float64)
    metric = Metric(moments)
    torch.testing.assert_close(metric.of(rows).square().sum(1).double(), cost(rows, apart), rtol=1e-4, atol=0)
    torch.testing.assert_close(metric.undone(metric.of(rows)), rows, rtol=1e-3, atol=1e-4)
    scale = rows.abs().amax(1, keepdim=True) / 7
    values, errors = gptq(rows, scale, WeightFormat("int4"), metric)
    torch.testing.assert_close(cost(rows - values * scale, apart), errors.double(), rtol=1e-3, atol=1e-9)


def test_moments_detect_nan_and_infinity():
    x = inputs(10, 8)
    assert moments_of(x).is_finite()
    for bad in (math.nan, math.inf, 1e19):  # squares of 1e19 add up to more than float32 holds
        x[3:7, 2] = bad
        assert not moments_of(x).is_finite()


def test_sampled_rows_are_rows_of_the_input_and_all_if_there_are_few():
    x = normal(3, 20, 5)
    assert torch.equal(sampled_rows(x, 60, torch.Generator()), x.reshape(60, 5))
    drawn = sampled_rows(x, 40, torch.Generator().manual_seed(2))
    assert drawn.shape == (40, 5) and all((x.reshape(60, 5) == row).all(1).any() for row in drawn)
    assert torch.equal(drawn, sampled_rows(x, 40, torch.Generator().manual_seed(2)))
    assert not torch.equal(drawn, sampled_rows(x, 40, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 2), (2, 1), (0, 1), (1, 2)), ((1, 1), (1, 1), (0, 0), (1, 1))],
)
def test_windows_equal_the_inputs_of_a_convolution(kernel, stride, padding, dilation):
    x = normal(2, 4, 9, 8)
    weight = normal(5, 4, *kernel)
    windows = sampled_windows(x, kernel, stride, padding, dilation, 10**6, torch.Generator())
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    packing = Packing(weight.shape, WeightFormat())
    torch.testing.assert_close(
        windows.double() @ packing.matrix(weight).double().t(), expected.permute(0, 2, 3, 1).reshape(-1, 5)
    )
    drawn = sampled_windows(x, kernel, stride, padding, dilation, 30, torch.Generator().manual_seed(1))
    assert drawn.shape == (30, windows.shape[1]) and all((windows == row).all(1).any() for row in drawn)


FORMATS = [
    WeightFormat("int4", calibrated=True), WeightFormat("int8", calibrated=True), WeightFormat("fp8", calibrated=True),
    WeightFormat("int4", calibrated=True, rank=4), WeightFormat("int4", 16, calibrated=True, rank=4),
    WeightFormat("int4", rotation=16, calibrated=True, rank=4, factors="bfloat16"),
    WeightFormat("int8", calibrated=True, rank=8),
]  # fmt: skip


@pytest.mark.parametrize("shape", [(24, 64), (10, 16, 2, 2)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_an_empty_patch_leaves_a_calibrated_weight_bit_identical(shape, fmt):
    weight, packing = normal(*shape), Packing(shape, fmt)
    found = calibrated_weight(weight, packing, moments_of(packing.rotated(inputs(300, 64))))
    again = packing.changed(packing.dequantize(found), found)
    assert torch.equal(again, found)
    values, scale = packing.values(found)
    matrix = (values.float().unflatten(1, (packing.groups, -1)) * scale[..., None]).flatten(1)
    matrix = rotate(matrix, packing.format.rotation) if packing.format.rotation else matrix
    if packing.format.rank:
        out, into = packing.factors(found)
        assert out.dtype == into.dtype == getattr(torch, fmt.factors)
        assert out.shape == (shape[0], packing.format.rank) and into.shape == (packing.format.rank, 64)
        matrix = matrix + out.float() @ into.float()
    torch.testing.assert_close(packing.matrix(packing.dequantize(found)), matrix)
    bits = 4 if fmt.kind == "int4" else 8
    of_factors = 2 * packing.format.rank * (shape[0] + 64)
    least = shape[0] * 64 * bits / 8 + 4 * shape[0] * packing.groups + of_factors
    assert least <= packing.nbytes < least + 32


def test_a_rank_is_at_most_the_weights():
    fmt = WeightFormat("int4", calibrated=True, rank=100)
    assert [Packing(shape, fmt).format.rank for shape in ((24, 64), (200, 48), (3, 320, 3, 3))] == [24, 48, 3]


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_rounding_again_keeps_the_scale_unless_it_clips_too_much(kind):
    rows, limit = normal(6, 32), LIMITS[kind]
    scale = rows.abs().amax(1, keepdim=True) * 0.9 / limit
    scale = scale.amax().expand_as(scale) if kind == "fp8" else scale
    rows[0, 3] = 1.3 * limit * scale[0, 0]  # one value of a row, for which a larger step for all others does not pay
    rows[1] *= 5
    values, found = rounded_like(rows, scale, WeightFormat(kind, calibrated=True))

    def error(one):
        return (rounded(rows, one, kind) * one - rows).square().sum(1, keepdim=True)

    widest = rows.abs().amax(1, keepdim=True) / limit
    widest = widest.amax().expand_as(scale) if kind == "fp8" else widest
    better = error(widest) < error(scale) if kind != "fp8" else (error(widest).sum() < error(scale).sum()).expand_as(scale)
    assert torch.equal(found, torch.where(better, widest, scale)) and better[1] and (kind != "int4" or not better.all())
    assert torch.equal(values, rounded(rows, found, kind))


def test_float_values_are_scaled_without_rounding():
    packing, values, scale = Packing((8, 32), WeightFormat("int4", group_size=16)), normal(8, 32).round(), normal(8, 2).abs()
    before = values.clone()
    scaled = packing.times_scales(values, scale, torch.float32)
    assert torch.equal(scaled, (before.unflatten(1, (2, 16)) * scale[..., None]).flatten(1)) and torch.equal(values, before)
