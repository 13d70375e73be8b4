"""Factors of low-rank matrices compared with the singular value decomposition; and the effect of a change on a packed
weight.
"""

import pytest
import torch
from test_gptq import inputs, moments_of

from iec_core.quantization.gptq import calibrated_weight
from iec_core.quantization.low_rank import balanced, factored
from iec_core.quantization.packing import LIMITS, Packing, WeightFormat, joined, rotate


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, rows=96, columns=160, seed=1):
    return normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)


# Factors


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (12, 300), (1, 8)])
@pytest.mark.parametrize("rank", [1, 5, 16, 17, 60])
def test_a_matrix_of_low_rank_has_factors_of_its_rank(rank, shape):
    rank = min(rank, *shape)
    matrix = of_rank(rank, *shape)
    out, into, rest = factored(matrix, 64, 1e-3 * matrix.norm().item())
    assert out.shape == (shape[0], rank) and into.shape == (rank, shape[1])
    assert (out.double() @ into.double() - matrix.double()).norm() <= 1e-3 * matrix.double().norm()
    torch.testing.assert_close(out @ into + rest, matrix)


def test_small_directions_are_kept_next_to_a_large_one():
    matrix = 100 * of_rank(1) + of_rank(20, seed=5)
    out, _, rest = factored(matrix, 64, 1e-4 * matrix.norm().item())
    assert out.shape[1] == 21 and rest.norm() <= 1e-4 * matrix.norm()


def test_negligible_parts_do_not_add_rank():
    matrix = of_rank(3) + 1e-5 * normal(96, 160, seed=7)
    assert factored(matrix, 64, 1e-3 * matrix.norm().item())[0].shape[1] == 3
    out, into, rest = factored(torch.zeros(8, 6), 64, 0.0)
    assert out.shape == (8, 0) and into.shape == (0, 6) and not rest.any()
    out, into, rest = factored(of_rank(3), 0, 0.0)
    assert out.shape == (96, 0) and torch.equal(rest, of_rank(3))


def test_for_too_high_a_rank_the_factors_are_nearly_optimal():
    powers = 0.9 ** torch.arange(96)
    matrix = torch.linalg.qr(normal(96, 96))[0] * powers @ torch.linalg.qr(normal(160, 96, seed=3))[0].t()
    out, _, rest = factored(matrix, 24, 1e-3 * matrix.norm().item())
    best = powers[24:].square().sum().sqrt()
    assert out.shape[1] == 24 and best <= rest.norm() < 1.1 * best


def test_factors_are_deterministic_and_leave_the_random_generator_unchanged():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = (factored(of_rank(7), 64, 1e-3) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(one, other)) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_kept(value):
    matrix = of_rank(2)
    matrix[3, 4] = value
    out, into, _ = factored(matrix, 64, 1.0)
    assert not (out @ into).isfinite().any()


def test_factors_are_balanced_for_half_precision():
    """A LoRA with a small alpha and one unused direction has such factors."""
    out, into = 1e-6 * normal(20, 3), 1e3 * normal(3, 30, seed=1)
    out[:, 1] = 0
    halves = [factor.half() for factor in balanced(out, into)]
    assert (halves[0].double() @ halves[1].double() - out.double() @ into.double()).norm() < 1e-3 * (out @ into).norm()
    torch.testing.assert_close(halves[0].float().norm(dim=0)[::2], halves[1].float().norm(dim=1)[::2], rtol=1e-3, atol=0)


def test_joined_branches_add_up():
    one, other = (normal(5, 2), normal(2, 7, seed=1)), (normal(5, 3, seed=2), normal(3, 7, seed=3))
    out, into = joined(one, None, other)
    torch.testing.assert_close(out @ into, one[0] @ one[1] + other[0] @ other[1])
    assert joined(None, one) is one and joined(None) is None


# Changes of a packed weight

FORMATS = [
    WeightFormat("int8"), WeightFormat("int4"), WeightFormat("int4", 16), WeightFormat("int4", search=True),
    WeightFormat("int4", rotation=16), WeightFormat("fp8"), WeightFormat("int4", factors="bfloat16"),
    WeightFormat("int4", calibrated=True), WeightFormat("int4", calibrated=True, rank=4),
    WeightFormat("int4", rotation=16, calibrated=True, rank=4), WeightFormat("fp8", calibrated=True),
]  # fmt: skip


def packed_weight(shape, fmt):
    packing = Packing(shape, fmt)
    weight = normal(*shape)
    if not fmt.calibrated:
        return packing, packing.quantize(weight)
    return packing, calibrated_weight(weight, packing, moments_of(packing.rotated(inputs(300, 64))))


@pytest.mark.parametrize("shape", [(24, 64), (10, 16, 2, 2)])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_low_rank_change_is_stored_in_the_branch(shape, fmt, size):
    packing, packed = packed_weight(shape, fmt)
    before = packing.dequantize(packed)
    change = of_rank(3, shape[0], 64).view(shape) * size
    changed = packing.changed(before + change, packed)
    left = packing.dequantize(changed).double() - before
    tolerance = {"float16": 2e-3, "bfloat16": 1e-2}[fmt.factors] + 1e-6 / size
    assert (left - change).norm() < tolerance * change.norm()
    assert all(torch.equal(*pair) for pair in zip(packing.stored(changed), packing.stored(packed)))
    rank = packing.format.rank
    assert packing.rank(packed) == rank and packing.rank(changed) == rank + 3
    if rank:
        assert all(torch.equal(*pair) for pair in zip(branch_of(packing, changed, rank), packing.factors(packed)))
    again = packing.changed(packing.dequantize(changed) - change, changed)
    assert (packing.dequantize(again) - before).norm() < tolerance * change.norm()


def branch_of(packing, packed, rank):
    out, into = packing.factors(packed)
    return out[:, :rank], into[:rank]


@pytest.mark.parametrize("fmt", FORMATS)
def test_an_empty_change_leaves_every_bit(fmt):
    packing, packed = packed_weight((24, 64), fmt)
    assert torch.equal(packing.changed(packing.dequantize(packed), packed), packed)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_large_high_rank_change_is_stored_in_the_integers(monkeypatch, fmt):
    """Without calibration the result is the quantized changed weight; for every format the branch keeps its rank, and the error
    is small.
    """
    monkeypatch.setattr(Packing, "most_rank_found", 8)
    packing, packed = packed_weight((24, 64), fmt)
    wanted = packing.dequantize(packed) + 3 * normal(24, 64, seed=4)
    changed = packing.changed(wanted, packed)
    assert packing.rank(changed) == packing.format.rank
    error = {"int4": 0.15, "int8": 0.01, "fp8": 0.04}[fmt.kind]
    assert (packing.dequantize(changed) - wanted).norm() < error * wanted.norm()
    if not fmt.calibrated:
        assert torch.equal(changed, packing.quantize(wanted))


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.kind == "int4"])
def test_a_small_high_rank_change_is_split_between_branch_and_integers(monkeypatch, fmt):
    monkeypatch.setattr(Packing, "most_rank_found", 8)
    packing, packed = packed_weight((24, 64), fmt)
    before = packing.dequantize(packed)
    change = 0.1 * normal(24, 64, seed=4)
    changed = packing.changed(before + change, packed)
    assert packing.rank(changed) == packing.format.rank + 8
    error = packing.matrix(before + change - packing.dequantize(changed))
    tail = torch.linalg.svdvals(change)[8:].square().sum().sqrt()
    assert error.norm() < 1.1 * tail  # what no branch of this rank can hold, minus what the integers hold
    kept = (change * (change - error)).sum() / change.square().sum()
    assert kept > 0.6


def test_uncalibrated_formats_depend_only_on_the_weight():
    weight, packing = normal(8, 32), Packing((8, 32), WeightFormat("int4"))
    values, scale = packing.values(packing.quantize(weight))
    expected = weight.double().abs().amax(1, keepdim=True) / LIMITS["int4"]
    torch.testing.assert_close(scale.double(), expected)
    assert torch.equal(values.double(), (weight.double() / expected).round())


def test_the_branch_is_not_rotated():
    packing, packed = packed_weight((24, 64), WeightFormat("int4", rotation=16))
    before, change = packing.dequantize(packed), 0.01 * of_rank(2, 24, 64)
    out, into = packing.factors(packing.changed(before + change, packed))
    assert (out.float() @ into.float() - change).norm() < 2e-3 * change.norm()
    values, scale = packing.values(packed)
    torch.testing.assert_close(before, rotate(values.float() * scale, 16))


def test_rank_limits_of_a_branch():
    shapes = (4096, 3072), (1280, 1280, 3, 3), (320, 320), (64, 64)
    packings = [Packing(shape, WeightFormat("int4")) for shape in shapes]
    assert [packing.most_rank for packing in packings] == [1755, 1152, 256, 256]
    assert [packing.most_rank_found for packing in packings] == [438, 288, 40, 16]
    for packing in packings[:2]:
        taken = 2 * packing.most_rank * (packing.rows + packing.inputs)
        assert 0.99 < taken / (2 * packing.rows * packing.inputs) <= 1


def test_a_branch_has_no_higher_rank_than_a_matrix_of_its_shape():
    packing, packed = packed_weight((24, 64), WeightFormat("int4"))
    before = packing.dequantize(packed)
    for seed in (3, 4):
        out, into = normal(24, 20, seed=seed), normal(20, 64, seed=seed + 5)
        before, packed = before + out @ into, packing.with_branch(packed, packing.thin(out, into))
    assert packing.rank(packed) == 24
    assert (packing.dequantize(packed) - before).norm() < 2e-3 * before.norm()
    high = 0.1 * normal(24, 64, seed=9)  # the integers lose it, and the branch has no room for it
    changed = packing.changed(before + high, packed)
    assert packing.rank(changed) <= 24 and (packing.dequantize(changed) - before - high).norm() < high.norm()
