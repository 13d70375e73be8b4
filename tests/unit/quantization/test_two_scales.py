"""Groups of 4-bit numbers with scales of output channels, compared with the definition in float64."""

import itertools

import pytest
import torch

from iec_core.quantization import two_scales
from iec_core.quantization.gptq import Metric, Moments, calibrated_weight, fitted, gptq
from iec_core.quantization.int8 import linear_int8
from iec_core.quantization.packing import Packing, WeightFormat, fitting_scales, quantize_rows, rounded_like, stood_for

GROUPS = WeightFormat("int4", 16, two_scales=True)
LEVELS = two_scales.LEVELS.double()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3():
    """Return all numbers above 0 of float8 e4m3, by its definition, float64, increasing."""
    least = [mantissa / 8 * 2.0**-6 for mantissa in range(1, 8)]
    others = [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16) for mantissa in range(8)]
    return torch.tensor(least + others[:-1], dtype=torch.float64)  # the last bits are NaN


def meant(values, shares, channel):
    """Return the dequantized values of -8 to 7, by the definition: [O, K] float64 of shares [O, G] and channel [O]."""
    groups = LEVELS[values.long() + 8].unflatten(1, (shares.shape[1], -1)) * shares.double()[..., None]
    return (groups.round() * channel.double()[:, None, None]).flatten(1)


def nearest(x):
    """Return the value -8 to 7 of the nearest level, by comparing all levels."""
    return (x.double()[..., None] - LEVELS).abs().argmin(-1) - 8


def unlike_rows(seed=0):
    """Return rows [7, 96] whose groups have different sizes; one group, and one row, are zero."""
    rows = normal(7, 96, seed=seed) * torch.logspace(-3, 1, 7)[:, None]
    rows *= torch.logspace(-1, 1, 6).repeat_interleave(16)
    rows[2, 32:48] = 0
    rows[4] = 0
    return rows


def test_levels_equal_those_of_lloyd_and_max():
    """Each level is the mean of the numbers nearest to it, for normal numbers divided by the largest of their 16."""
    x = normal(40_000, 16).double()
    x = (x / x.abs().amax(1, keepdim=True)).flatten()
    of = torch.bucketize(x, (LEVELS[1:] + LEVELS[:-1]) / 2)
    means = torch.stack([x[of == number].mean() for number in range(16)])
    torch.testing.assert_close(means, LEVELS, rtol=0, atol=2e-3)
    assert torch.equal(LEVELS, -LEVELS.flip(0))
    even = torch.linspace(-1, 1, 15, dtype=torch.float64)
    errors = [(x[:, None] - levels).abs().amin(1).square().mean() for levels in (LEVELS, even)]
    assert errors[0] < 0.8 * errors[1]


def test_values_are_rounded_to_the_nearest_level():
    x = torch.cat([normal(2000), torch.tensor([-9.0, 9.0, 0.01, -0.01])])
    assert torch.equal(two_scales.nearest(x).long(), nearest(x))
    assert torch.equal(two_scales.levels(torch.arange(-8, 8)).double(), LEVELS)


def test_bits_agree_with_e4m3():
    numbers = e4m3()
    bits = torch.arange(1, 127, dtype=torch.uint8)
    assert torch.equal(two_scales._of_bits(bits).double(), numbers) and two_scales._of_bits(bits[:0]).shape == (0,)
    assert torch.equal(two_scales._bits(numbers.float()), bits)
    assert numbers[two_scales.LARGEST_BITS - 1] == two_scales.LARGEST and numbers[0] == two_scales.LEAST
    assert (LEVELS.max() * two_scales.LARGEST).round() <= 127


def test_group_scales_are_the_nearest_e4m3_fractions_of_the_channels_scale():
    rows, numbers = unlike_rows(), e4m3()
    scale = fitting_scales(rows, GROUPS)
    bits, channel = two_scales.split(scale)
    assert (bits.dtype, bits.shape, channel.shape) == (torch.uint8, (7, 6), (7, 1))
    largest = rows.double().unflatten(1, (6, 16)).abs().amax(2)
    for row in range(7):
        if row == 4:
            continue
        assert channel[row, 0].item() == pytest.approx(largest[row].amax().item() / 128, rel=1e-6)
        for group in range(6):
            wanted = largest[row, group] / largest[row].amax() * 128
            assert numbers[int(bits[row, group]) - 1] == numbers[(numbers - wanted).abs().argmin()], (row, group)
    assert (scale > 0).all() and bits.max() == two_scales.LARGEST_BITS
    assert torch.equal(two_scales.snapped(scale), scale) and torch.equal(two_scales.group_scales(bits, channel), scale)
    for share in (1.1, 0.95, 0.5):  # a clipping range of a channel
        again, smaller = two_scales.split(scale * share)
        assert torch.equal(again, bits)
        torch.testing.assert_close(smaller, channel * share, rtol=1e-6, atol=0)


def test_a_search_finds_the_scale_of_least_error():
    """The scale, before it is rounded to a share, is compared with many more scales in float64.

    With an importance of the inputs, the weighted error is compared.
    """
    groups, importance = normal(1, 200, 16, seed=3), torch.linspace(0.1, 3, 16) ** 2
    for weight in (torch.ones(16), importance):
        scale = two_scales.searched(groups, weight)[0].double()
        tried = groups[0].double().abs().amax(1) * torch.linspace(1.2, 0.3, 400, dtype=torch.float64)[:, None]

        def error(one, weight=weight):
            found = LEVELS[nearest(groups[0] / one[..., None]) + 8] * one[..., None]
            return ((found - groups[0]).square() * weight).sum(-1)

        best, found, plain = error(tried).amin(0), error(scale), error(two_scales.fitting(groups)[0].double())
        assert (found >= best * 0.98).all() and found.sum() < 1.25 * best.sum() and found.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("search", [False, True])
def test_a_weight_is_rounded_to_its_dequantized_values(search):
    fmt = WeightFormat("int4", 16, two_scales=True, search=search)
    rows, packing = unlike_rows(), Packing((7, 96), fmt)
    packed = packing.quantize(rows)
    values, scale = quantize_rows(rows, fmt)
    _, channel, bits = packing.stored(packed)
    shares = e4m3()[bits.long() - 1]
    expected = meant(values, shares, channel[:, 0])
    torch.testing.assert_close(packing.dequantize(packed).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(stood_for(values, scale, fmt).double(), expected, rtol=1e-6, atol=0)
    int8, of_channel = packing.values(packed)
    assert int8.dtype == torch.int8 and int8.abs().max() <= 126 and of_channel.shape == (7, 1)
    assert torch.equal(int8.double(), (expected / channel.double()).round())
    of_groups = (rows.unflatten(1, (6, 16)) / scale[..., None]).flatten(1)
    assert torch.equal(values.long(), nearest(of_groups))
    assert ((expected - rows).norm(dim=1) <= 0.11 * rows.norm(dim=1) + 1e-20).all()  # there is no level of zero
    assert packing.nbytes == 7 * 48 + 4 * 7 + 7 * 6 and len(packed) == packing.nbytes
    assert torch.equal(packing.scale(packed), scale)
    assert torch.equal(packing.pack(packing.stored(packed)), packed)


def test_products_agree_with_int8():
    rows, packing, x = normal(16, 96), Packing((16, 96), GROUPS), normal(5, 96, seed=1)
    values, scale = packing.values(packing.quantize(rows))
    of_x = x.abs().amax(1, keepdim=True).double() / 127
    expected = (x / of_x).round() @ values.double().t() * of_x * scale[:, 0].double()
    torch.testing.assert_close(linear_int8(x, values, scale[:, 0], None).double(), expected, rtol=1e-5, atol=1e-5)


def test_many_rows_are_quantized_in_parts(monkeypatch):
    rows, packing = normal(20, 96), Packing((20, 96), GROUPS)
    packed = packing.quantize(rows)
    values, scale = packing.values(packed)
    monkeypatch.setattr(two_scales, "AT_ONCE", 300)  # three rows
    assert torch.equal(packing.quantize(rows), packed) and torch.equal(packing.values(packed)[0], values)
    compiled = torch.compile(packing.values, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed)[0], values) and torch.equal(compiled(packed)[1], scale)


def test_no_more_than_a_part_is_in_32_bits():
    values, shares = torch.zeros(512, 4096, dtype=torch.int8), torch.full((512, 256), 0x70, dtype=torch.uint8)
    made = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.append(out.nbytes if isinstance(out, torch.Tensor) else 0)
            return out

    with pytest.MonkeyPatch.context() as patch, Largest():
        patch.setattr(two_scales, "AT_ONCE", 2**18)
        two_scales.integers(values, shares)
    assert max(made) == values.nbytes  # the result itself


def test_shapes_without_groups_have_one_scale():
    for shape, fmt in (((7, 90), GROUPS), ((7, 96), WeightFormat("int8", two_scales=True))):
        packing = Packing(shape, fmt)
        assert not packing.format.two_scales and len(packing.stored(packing.quantize(normal(*shape)))) == 2


def moments_of(x):
    moments = Moments(x.shape[1], 10**6, "cpu")
    moments.take_up(x)
    return moments


def test_gptq_equals_the_recurrence_over_dequantized_values():
    """The reference is LDLQ in float64: each column in turn, by decreasing diagonal, with the remainders of the columns before
    it.
    """
    x = normal(400, 48, seed=2) @ (torch.eye(48) + 0.3 * normal(48, 48, seed=3) / 7) * torch.linspace(0.3, 2, 48)
    rows, metric = unlike_rows(seed=5)[:, :48], Metric(moments_of(x))
    scale = fitting_scales(rows, GROUPS) * 0.9
    values, errors = gptq(rows, scale, GROUPS, metric)
    shares, channel = (part.double() for part in two_scales.numbers(scale))
    ((order, factor),) = metric.parts
    factor, left = factor.double(), torch.zeros(7, 48, dtype=torch.float64)
    expected, cost = torch.empty(7, 48, dtype=torch.int64), torch.zeros(7, dtype=torch.float64)
    for k, place in enumerate(order.tolist()):
        wanted = rows.double()[:, place] + left[:, :k] @ factor[:k, k] / factor[k, k]
        of_group = shares[:, place // 16]
        expected[:, place] = nearest(wanted / (of_group * channel[:, 0]))
        stands_for = (LEVELS[expected[:, place] + 8] * of_group).round() * channel[:, 0]
        left[:, k] = rows.double()[:, place] - stands_for
        cost += ((wanted - stands_for) * factor[k, k]) ** 2
    assert (values.long() == expected).float().mean() > 0.99  # a tie is decided by rounding
    same = (values.long() == expected).all(1)
    assert same.sum() >= 5
    torch.testing.assert_close(errors.double()[same], cost[same], rtol=1e-4, atol=1e-12)
    off = rows.double() - meant(values, shares, channel[:, 0])
    torch.testing.assert_close(metric.of(off.float()).square().sum(1), errors, rtol=1e-3, atol=1e-9)


def test_gptq_is_near_the_brute_force_optimum():
    """The weights have two groups of two inputs."""
    x = normal(300, 4, seed=1) @ (torch.eye(4) + 0.5 * normal(4, 4, seed=2)) * torch.tensor([0.3, 1.0, 0.6, 2.0])
    rows, fmt, metric = normal(12, 4, seed=6), WeightFormat("int4", 2, two_scales=True), Metric(moments_of(x))
    scale = fitting_scales(rows, fmt)
    _, errors = gptq(rows, scale, fmt, metric)
    shares, channel = two_scales.numbers(scale)
    grid = torch.tensor(list(itertools.product(range(-8, 8), repeat=4)))
    least = torch.stack(
        [
            metric.of((row - meant(grid, share.expand(len(grid), 2), of_row.expand(len(grid)))).float()).square().sum(1).amin()
            for row, share, of_row in zip(rows, shares, channel)
        ]
    )
    rounded = metric.of(rows - stood_for(*quantize_rows(rows, fmt), fmt)).square().sum(1)
    assert (errors >= least * (1 - 1e-4)).all()
    assert errors.sum() < 1.15 * least.sum() and errors.sum() < rounded.sum()


@pytest.mark.parametrize("shape", [(24, 64), (10, 16, 2, 2)])
@pytest.mark.parametrize("rank", [0, 4])
def test_groups_keep_more_than_channels(shape, rank):
    """The error in the metric is smaller, also with a branch. A weight with an empty patch is unchanged, bit for bit."""
    weight, x = normal(*shape), normal(300, 64, seed=4) * torch.linspace(0.2, 2, 64)
    metric, errors = Metric(moments_of(x)), []
    for fmt in (
        WeightFormat("int4", calibrated=True, rank=rank), WeightFormat("int4", 16, calibrated=True, rank=rank, two_scales=True)
    ):  # fmt: skip
        packing = Packing(shape, fmt)
        packed = calibrated_weight(weight, packing, moments_of(x))
        errors.append(metric.of(packing.matrix(weight - packing.dequantize(packed))).square().sum().item())
        assert torch.equal(packing.changed(packing.dequantize(packed), packed), packed)
    assert errors[1] < 0.7 * errors[0]


def test_importance_is_the_metrics_of_each_column():
    """This also holds if the metric has several blocks."""
    x = normal(300, 64, seed=4) * torch.linspace(0.2, 2, 64)
    for most in (10**6, 20):
        moments = Moments(64, most, "cpu")
        moments.take_up(x)
        metric = Metric(moments)
        importance = metric.importance(16).flatten()
        for columns, factor in metric.parts:
            torch.testing.assert_close(importance[columns], factor.diagonal() ** 2)


def test_calibrated_groups_have_the_scales_of_a_search(monkeypatch):
    """The scales minimize the cost of their columns, for rows in several parts."""
    monkeypatch.setattr("iec_core.quantization.gptq.LEAST_ELEMENTS", 1000)
    x, rows = normal(300, 64, seed=4) * torch.linspace(0.2, 2, 64), normal(40, 64)
    metric = Metric(moments_of(x))
    values, scale = fitted(rows, GROUPS, metric)
    assert torch.equal(scale, two_scales.searched(rows.unflatten(1, (4, 16)), metric.importance(16)))
    expected, errors = gptq(rows, scale, GROUPS, metric)
    assert torch.equal(values, expected)
    fitting = gptq(rows, two_scales.fitting(rows.unflatten(1, (4, 16))), GROUPS, metric)[1]
    assert errors.sum() < 0.97 * fitting.sum()


def test_rounding_again_keeps_the_scales_unless_they_clip_too_much():
    rows = unlike_rows()[:4]
    before = fitting_scales(rows, GROUPS)
    changed = rows.clone()
    changed[1, 16:32] *= 6
    values, scale = rounded_like(changed, before, WeightFormat("int4", 16, calibrated=True, two_scales=True))
    assert torch.equal(scale[[0, 2, 3]], before[[0, 2, 3]]) and scale[1, 1] > 2 * before[1, 1]
    assert torch.equal(values.long(), nearest(changed / scale.repeat_interleave(16, 1)))
    assert torch.equal(two_scales.snapped(scale), scale)
