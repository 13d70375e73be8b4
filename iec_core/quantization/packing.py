"""How a weight is quantized, and how it is stored in memory.

Weights are quantized symmetrically. There is one scale per output channel, or one per group of consecutive inputs of an output
channel. A low-rank branch is optional: two thin factors in 16 bits, whose product is added to the weight (SVDQuant, arXiv
2411.05007). The integers, scales and factors of a layer are packed into one tensor of bytes, so that a weight is moved, backed
up and counted as one tensor. The weights of convolutions are stored with their channels last, as the matrix
[out, height * width * in] that the product needs.

Later changes of a weight, such as a LoRA, are added to the branch, whose rank grows as needed. In the few bits of the integers,
rounding would remove small changes.

Shapes in this file: O output channels, K inputs per output channel, G groups per output channel, r the rank of the branch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import SettingsError
from . import two_scales
from .low_rank import Factors, balanced, factored

# Bits per number of each kind.
BITS = {"int8": 8, "int4": 4, "fp8": 8}

# The largest number of each kind.
LIMITS = {"int8": 127, "int4": 7, "fp8": 448}

# Numbers up to the largest number of a kind times this factor are rounded to the largest number; those above are clipped.
CLIPS_FROM = {"int8": 127.5 / 127, "int4": 7.5 / 7, "fp8": 464 / 448}

# Fractions of the largest magnitude that a search tries as clipping range.
CLIPPING = torch.linspace(1, 0.4, 31).tolist()

ALIGNMENT = 16  # bytes; the scales and the factors begin at multiples of it
FACTOR_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

LEAST_LIMIT, LEAST_LIMIT_FOUND = 256, 16  # lower bounds of `most_rank` and `most_rank_found`
QUICK_RANK = 48  # highest rank of a change's factors that is tried before the change is tried in the integers
NEGLIGIBLE = 1e-3  # fraction of a change's norm that its factors may leave out
NOISE = 2**-22  # fraction of a weight's norm: the rounding error of a change that was added to it in float32
ENOUGH = 0.95  # fraction of a change of higher rank that the integers must keep, so that it is stored in them alone


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is quantized.

    kind: one of LIMITS; fp8 is float8 e4m3 with one scale for the whole weight.
    group_size: number of consecutive inputs that share a scale; 0 for one scale per output channel. A size that does not divide
    the number of inputs counts as 0.
    rotation: size of the Hadamard blocks by which the inputs of a Linear layer are rotated before quantization; 0 for none.
    search: whether scales have the least error over clipping ranges, instead of fitting the largest magnitude.
    calibrated: whether scales, integers and factors were found by `gptq`, from a layer's inputs too, not from the weight alone.
    rank: rank of the low-rank branch, 0 for none; at most the rank of the weight.
    factors: dtype of the branch, one of FACTOR_DTYPES.
    two_scales: whether groups of int4 have the format of `two_scales.py`, for which 8-bit products can be used; its numbers, -8
    to 7, select levels.
    """

    kind: str = "int8"
    group_size: int = 0
    rotation: int = 0
    search: bool = False
    calibrated: bool = False
    rank: int = 0
    factors: str = "float16"
    two_scales: bool = False


def hadamard(size: int) -> torch.Tensor:
    """Return the regular Hadamard matrix of `size`, divided by sqrt(size): float32 [size, size], symmetric and its own inverse.

    It is the matrix of ConvRot (arXiv 2512.03673), the same as in comfy-kitchen. Raises SettingsError if `size` is not a power
    of 4.
    """
    block = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = block
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    if len(matrix) != size:
        raise SettingsError(f"rotation: {size} is not a power of 4.")
    return matrix / math.sqrt(size)


# A copy to the device in every call would wait for the device.
_matrices: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return x [..., C] with its last dimension rotated in blocks of `size`, which divides C."""
    key = size, x.device, x.dtype
    if key not in _matrices:
        _matrices[key] = hadamard(size).to(x)
    return (x.unflatten(-1, (-1, size)) @ _matrices[key]).flatten(-2)


def rotation_size(inputs: int) -> int:
    """Return the largest supported block size that divides the number of inputs; 0 if there is none."""
    return next((size for size in (256, 64, 16) if inputs % size == 0), 0)


def _scaled_integers(rows: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    return (rows / scale).round_().clamp_(-limit, limit)


def rounded(rows: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Return rows divided by scales, which broadcast over them, rounded to the nearest numbers of the kind, as float32."""
    limit = LIMITS[kind]
    if kind == "fp8":
        return (rows / scale).clamp_(-limit, limit).to(torch.float8_e4m3fn).float()
    return _scaled_integers(rows, scale, limit)


def scales(rows: torch.Tensor, limit: int, search: bool = False) -> torch.Tensor:
    """Return scales float32 [..., 1] of rows [..., C]: the largest magnitude divided by the limit, or, with search, the scale
    of least squared error.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    widest = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    if not search:
        return widest
    best, least = widest, torch.full_like(widest, math.inf)
    for share in CLIPPING:
        scale = widest * share
        error = (_scaled_integers(rows, scale, limit).mul_(scale) - rows).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def quantize_rows(rows: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values int8 or float8 [O, K], scale float32 [O, G]) of rows [O, K], rounded to nearest.

    The weights of the paper have kind int8 or int4, group_size 0 and search.
    """
    rows, limit = rows.float(), LIMITS[fmt.kind]
    if fmt.kind == "fp8":
        scale = scales(rows.reshape(1, -1), limit)
        return rounded(rows, scale, "fp8").to(torch.float8_e4m3fn), scale.expand(rows.shape[0], 1).contiguous()
    if fmt.two_scales:
        return two_scales.quantized(rows, fmt.group_size, fmt.search)
    groups = in_groups(rows, fmt.group_size)
    scale = scales(groups, limit, fmt.search)
    return rounded(groups, scale, fmt.kind).to(torch.int8).flatten(1), scale[..., 0]


def in_groups(rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return rows [O, K] as [O, G, K / G], where the inputs of a group share a scale."""
    return rows.unflatten(1, (-1, group_size)) if group_size else rows[:, None]


def rounded_in(rows: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Return rows divided by scales, rounded to the nearest numbers of the format, as float32."""
    return two_scales.nearest(rows / scale) if fmt.two_scales else rounded(rows, scale, fmt.kind)


def fitting_scales(rows: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Return the scales float32 [O, G] with which the largest magnitudes of rows [O, K] just fit into the format."""
    if fmt.kind == "fp8":
        return scales(rows.reshape(1, -1), LIMITS[fmt.kind]).expand(len(rows), 1)
    groups = in_groups(rows, fmt.group_size)
    return two_scales.fitting(groups) if fmt.two_scales else scales(groups, LIMITS[fmt.kind])[..., 0]


def stood_for(values: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """Return the weights, float32 [O, K], that values [O, K] with scales [O, G] represent."""
    groups = values.float().unflatten(1, (scale.shape[1], -1))
    if not fmt.two_scales:
        return (groups * scale[..., None]).flatten(1)
    return two_scales.stood_for(groups, *(part[..., None] for part in two_scales.numbers(scale))).flatten(1)


def rounded_like(rows: torch.Tensor, scale: torch.Tensor, fmt: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (values float32 [O, K], scale float32 [O, G]) of rows [O, K] rounded to nearest with given scales [O, G].

    A group that its given scale would clip gets a scale that fits its largest magnitude, if that makes the error smaller.
    """
    groups, kept, fitting = in_groups(rows, fmt.group_size), scale[..., None], fitting_scales(rows, fmt)[..., None]
    values, others = (rounded_in(groups, one, fmt) for one in (kept, fitting))
    level: Callable[[torch.Tensor], torch.Tensor] = two_scales.levels if fmt.two_scales else torch.Tensor.float
    error, other = (
        (level(part) * one - groups).square().sum(-1, keepdim=True) for part, one in ((values, kept), (others, fitting))
    )
    if fmt.kind == "fp8":  # one scale for the whole weight
        error, other = (part.sum().expand_as(kept) for part in (error, other))
    clipped = (other < error) & (fitting > CLIPS_FROM[fmt.kind] * kept)
    if fmt.two_scales:  # the scales of a channel's groups depend on its largest scale
        kept = two_scales.snapped(torch.where(clipped, fitting, kept)[..., 0])[..., None]
        return rounded_in(groups, kept, fmt).flatten(1), kept[..., 0]
    return torch.where(clipped, others, values).flatten(1), torch.where(clipped, fitting, kept)[..., 0]


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """Return values -8 to 7, int8 [O, K], packed as uint8 [O, ceil(K / 2)]: two per byte, the first in the lower half."""
    values = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).view(torch.uint8)
    return (values[:, ::2] & 0xF) | (values[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return the int8 values [O, inputs] from the output of `pack_nibbles`."""
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(1)[:, :inputs].contiguous()


def scaled_values(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values times float32 scales, which broadcast over them, in `dtype`: the float32 product, rounded.

    The values are int8 or float8 numbers, possibly stored in a larger dtype. float16 and bfloat16 hold such numbers exactly. On
    a GPU no float32 copy of the product is allocated.
    """
    return values.to(dtype, copy=True).mul_(scale)


def joined(*branches: Factors | None) -> Factors | None:
    """Return the factors (out [O, r], into [r, K]) of one branch that is the sum of several. A branch may be None; if all are
    None, return None.
    """
    found = [factors for factors in branches if factors is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([out for out, _ in found], dim=1), torch.cat([into for _, into in found])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Packing:
    """The layout of a packed weight: where its integers, scales and factors are in one tensor of bytes, int8 [nbytes].

    shape: shape of the weight, [O, C] of a Linear or [O, C, kh, kw] of a Conv2d layer. format: the WeightFormat, without the
    settings that the shape does not allow (groups, rotation). rows, inputs, groups: O, K and G. nbytes: size of a weight that
    has the branch of the format and no later changes.
    """

    def __init__(self, shape: Sequence[int], fmt: WeightFormat) -> None:
        self.shape = torch.Size(shape)
        self.rows, self.inputs = self.shape[0], math.prod(self.shape[1:])
        group = fmt.group_size if fmt.kind != "fp8" and fmt.group_size and self.inputs % fmt.group_size == 0 else 0
        rotation = fmt.rotation if len(self.shape) == 2 and fmt.rotation and self.inputs % fmt.rotation == 0 else 0
        rank = min(fmt.rank, self.rows, self.inputs)
        two = fmt.two_scales and fmt.kind == "int4" and group > 0
        self.format = replace(fmt, group_size=group, rotation=rotation, rank=rank, two_scales=two)
        self.groups = self.inputs // group if group else 1
        self._row_bytes = -(-self.inputs // 2) if fmt.kind == "int4" else self.inputs
        self._dtype = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[self.format.kind]
        self._scales_at = _aligned(self.rows * self._row_bytes)
        self._shares_at = self._scales_at + 4 * self.rows * (1 if two else self.groups)
        self._scales_end = self._shares_at + two * self.rows * self.groups
        self._factors_at = _aligned(self._scales_end)
        self.nbytes = self._nbytes_with(rank)

    def pack(self, stored: Sequence[torch.Tensor], factors: Factors | None = None) -> torch.Tensor:
        """Return a packed weight, int8 [nbytes], from tensors as `stored` returns them and factors [O, r] and [r, K] of any
        rank. The inverse of `stored` and `factors`.
        """
        rank = factors[0].shape[1] if factors else 0
        packed = torch.zeros(self._nbytes_with(rank), dtype=torch.int8, device=stored[0].device)
        for place, tensor in zip((*self.stored(packed), *(self.factors(packed) or ())), (*stored, *(factors or ()))):
            place.copy_(tensor)
        return packed

    @property
    def most_rank(self) -> int:
        """The highest rank of given factors, such as those of a LoRA, that are added to the branch: LEAST_LIMIT, or the rank at
        which the factors are as large as the weight in 16 bits, whichever is higher.
        """
        return max(LEAST_LIMIT, self.rows * self.inputs // (self.rows + self.inputs))

    @property
    def most_rank_found(self) -> int:
        """The highest rank of factors that are computed from a change, and may leave part of it out: LEAST_LIMIT_FOUND, or the
        rank at which the factors are a quarter as large as the weight in 16 bits, whichever is higher.
        """
        return max(LEAST_LIMIT_FOUND, self.rows * self.inputs // (4 * (self.rows + self.inputs)))

    def _nbytes_with(self, rank: int) -> int:
        return self._factors_at + 2 * rank * (self.rows + self.inputs) if rank else self._scales_end

    def stored(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views into a packed weight: (stored values, scales) or, with two scales, (stored values, scales of channels,
        shares).

        Stored values: int8 or float8 [O, K], for int4 uint8 [O, ceil(K / 2)]. Scales: float32 [O, G]; scales of channels:
        float32 [O, 1]; shares: uint8 [O, G].
        """
        values = packed[: self.rows * self._row_bytes].view(self._dtype).view(self.rows, self._row_bytes)
        scale = packed[self._scales_at : self._shares_at].view(torch.float32).view(self.rows, -1)
        if not self.format.two_scales:
            return values, scale
        return values, scale, packed[self._shares_at : self._scales_end].view(torch.uint8).view(self.rows, self.groups)

    def scale(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the scales, float32 [O, G], of a packed weight's groups."""
        _, scale, *shares = self.stored(packed)
        return two_scales.group_scales(shares[0], scale) if shares else scale

    def factors(self, packed: torch.Tensor) -> Factors | None:
        """Return views into a packed weight: the factors [O, r] and [r, K] of the low-rank branch, None without a branch. Their
        product must be added to the weight; it is never rotated.
        """
        rank = self.rank(packed)
        if not rank:
            return None
        factors = packed[self._factors_at :].view(FACTOR_DTYPES[self.format.factors])
        return factors[: self.rows * rank].view(self.rows, rank), factors[self.rows * rank :].view(rank, self.inputs)

    def rank(self, packed: torch.Tensor) -> int:
        """Return the rank of a packed weight's branch, from the weight's number of bytes. Later changes make it higher than the
        format's rank.
        """
        return max(packed.numel() - self._factors_at, 0) // (2 * (self.rows + self.inputs))

    def values(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values int8 or float8 [O, K], scale float32 [O, G]) of a packed weight, as a matrix product uses them. With
        two scales, the values are the expanded int8 numbers and the scale is [O, 1].
        """
        return self.unpacked(self.stored(packed))

    def unpacked(self, stored: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as `values`, from the output of `stored`."""
        integers, scale, *shares = stored
        values = unpack_nibbles(integers, self.inputs) if self.format.kind == "int4" else integers
        return two_scales.integers(values, *shares) if shares else values, scale

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a floating-point weight of `shape` quantized and packed, int8 [nbytes]. The format must not be calibrated."""
        return self.packed_rows(*quantize_rows(self.rotated(self.matrix(weight.detach().float())), self.format))

    def changed(self, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """Return a packed weight changed so that it represents another floating-point weight of `shape`.

        A change of low rank is added to the branch; integers and scales stay unchanged. A change of higher rank is rounded into
        the integers, if they keep enough of it (ENOUGH). The result is then the same as a change before quantization, unless
        the format is calibrated or the weight has a branch. Otherwise the branch gets the largest part that `most_rank_found`
        allows, and the rest is rounded into the integers.
        """
        wanted, packed = self.matrix(weight.detach().float()), packed.to(weight.device)
        change = wanted - self.matrix(self.dequantize(packed))
        negligible = max(NEGLIGIBLE * change.norm().item(), NOISE * wanted.norm().item())
        quick = min(QUICK_RANK, self.most_rank_found)
        out, into, rest = factored(change, quick, negligible)
        if rest.norm() > negligible:
            alone = self.rounded_anew(wanted, packed)
            kept = change - (wanted - self.matrix(self.dequantize(alone)))
            if (change * kept).sum() >= ENOUGH * change.square().sum():
                return alone
            if quick < self.most_rank_found:
                out, into, rest = factored(change, self.most_rank_found, negligible)
        if rest.norm() > negligible:
            return self.rounded_anew(wanted, packed, (out, into))
        return self.with_branch(packed, (out, into))

    def with_branch(self, packed: torch.Tensor, factors: Factors) -> torch.Tensor:
        """Return a packed weight with factors [O, r] and [r, K] added to its branch."""
        return self.pack(self.stored(packed), self._with_factors(packed, factors))

    def _with_factors(self, packed: torch.Tensor, added: Factors | None) -> Factors | None:
        """Return the factors of a packed weight's branch joined with those of `added`; None if there are none."""
        factors, most = joined(self.factors(packed), added), min(self.rows, self.inputs)
        if factors is None or factors[0].shape[1] <= most:
            return factors
        return factored(self._branch(factors), most, 0.0)[:2]  # a matrix of this shape has at most this rank

    def thin(self, out: torch.Tensor, into: torch.Tensor) -> Factors:
        """Return factors [O, r] and [r, K] balanced and in the dtype of the branch."""
        dtype = FACTOR_DTYPES[self.format.factors]
        out, into = (factor.to(dtype) for factor in balanced(out, into))
        return out, into

    def rounded_anew(self, rows: torch.Tensor, packed: torch.Tensor, added: Factors | None = None) -> torch.Tensor:
        """Return a packed weight whose integers are rounded again, so that integers and branch together represent rows, float32
        [O, K]. The branch is that of the packed weight with the factors `added`.

        Scales stay unchanged if the format is calibrated or factors are added. Else they are computed again.
        """
        factors, scale = self._with_factors(packed, added), self.scale(packed)
        rows = self.rotated(rows - self._branch(factors) if factors else rows)
        keeps_scales = self.format.calibrated or added
        found = rounded_like(rows, scale, self.format) if keeps_scales else quantize_rows(rows, self.format)
        return self.packed_rows(*found, factors)

    def packed_rows(self, values: torch.Tensor, scale: torch.Tensor, factors: Factors | None = None) -> torch.Tensor:
        """Return a packed weight, int8 [nbytes]. values: [O, K] of any dtype, numbers of the kind, rotated if the format is.
        scale: float32 [O, G]; with two scales, from `two_scales.snapped`.
        """
        if self.format.kind == "int4":
            values = pack_nibbles(values.to(torch.int8))
        scales: Iterable[torch.Tensor] = reversed(two_scales.split(scale)) if self.format.two_scales else (scale,)
        return self.pack((values.to(self._dtype), *scales), factors)

    def dequantize(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that a packed weight represents, with its branch, in `dtype` and of `shape`."""
        rows, factors = self.rotated(self.scaled(packed)), self.factors(packed)
        if factors is not None:
            rows = rows + self._branch(factors)
        return self.shaped(rows).to(dtype)

    def rotated(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [O, K] rotated if the format has a rotation. The rotation is its own inverse."""
        return rotate(rows, self.format.rotation) if self.format.rotation else rows

    @staticmethod
    def _branch(factors: Factors) -> torch.Tensor:
        out, into = factors
        return out.float() @ into.float()

    def scaled(self, packed: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return integers times scales, [O, K] in `dtype`, without the low-rank branch; a rotated weight stays rotated."""
        return self.times_scales(*self.values(packed), dtype)

    def times_scales(self, values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the same as `scaled`, from the output of `values`."""
        return scaled_values(values.unflatten(1, (scale.shape[1], -1)), scale[..., None], dtype).flatten(1)

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight of `shape` as rows [O, K]; a weight with another number of outputs is accepted too."""
        return weight.flatten(1) if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

    def shaped(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows [O, K] as a weight of `shape`, a view. Another number of rows gives a weight with that many outputs."""
        if len(self.shape) == 2:
            return rows
        _, channels, height, width = self.shape
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)
