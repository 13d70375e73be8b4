"""How a weight is quantized, and how it lies in memory.

Weights are symmetric, with a scale for each output channel, or for each group of consecutive inputs of one. Beside them there
may be a low-rank branch, two thin factors in 16 bits whose product is added to the weight (SVDQuant, arXiv 2411.05007). A
layer's integers, scales and factors are packed into one tensor of bytes, so that whoever moves, backs up or counts a weight
does so with one tensor. Convolutions lie with their channels last, as the matrix [out, height * width * in] that they are
computed with.

What changes a weight afterwards goes into the branch, which becomes as large as that takes: few bits would round it away.
"""

import math
from dataclasses import dataclass, replace

import torch

from . import two_scales
from .low_rank import balanced, factored

# Bits of each kind.
BITS = {"int8": 8, "int4": 4, "fp8": 8}

# The largest number of each kind.
LIMITS = {"int8": 127, "int4": 7, "fp8": 448}

# From how many times that of the largest number on a number is not rounded to it, but clipped.
CLIPS_FROM = {"int8": 127.5 / 127, "int4": 7.5 / 7, "fp8": 464 / 448}

# Shares of the largest magnitude that a search tries as clipping range.
CLIPPING = torch.linspace(1, 0.4, 31).tolist()

ALIGNMENT = 16  # bytes: where the scales and the factors begin
FACTOR_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

LEAST_LIMIT, LEAST_LIMIT_FOUND = 256, 16  # ranks that a change may add to the branch of any weight
QUICK_RANK = 48  # up to which factors of a change are looked for before it is tried in the integers
NEGLIGIBLE = 1e-3  # share of a change's norm that its factors may leave out
NOISE = 2**-22  # of a weight's norm: what a float32 sum of it and a change leaves of the latter
ENOUGH = 0.95  # share of a change of a higher rank that integers have to keep, for all of it to go into them


@dataclass(frozen=True)
class WeightFormat:
    """kind: one of LIMITS; fp8 is float8 e4m3 with one scale for the whole weight. group_size: how many consecutive inputs
    share a scale, 0 all of an output channel; where it does not divide the inputs, it is 0. rotation: size of the Hadamard
    blocks by which a Linear layer's inputs are rotated before they are quantized, 0 none. search: whether scales are those of
    least error over clipping ranges, instead of those of the largest magnitude. calibrated: whether scales, integers and
    factors are those that `gptq` has found, and no function of the weight alone. rank: of the low-rank branch, 0 none;
    at most that of the weight. factors: its type, one of FACTOR_DTYPES. two_scales: whether groups of int4 are those of
    `two_scales.py`, so that 8-bit products serve; their numbers are -8 to 7, and stand for levels.
    """

    kind: str = "int8"
    group_size: int = 0
    rotation: int = 0
    search: bool = False
    calibrated: bool = False
    rank: int = 0
    factors: str = "float16"
    two_scales: bool = False


def hadamard(size):
    """Return the regular Hadamard matrix of `size` (a power of 4), over its square root: float32 [size, size], symmetric and
    its own inverse. It is that of ConvRot (arXiv 2512.03673), as comfy-kitchen has it.
    """
    block = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = block
    while len(matrix) < size:
        matrix = torch.kron(matrix, block)
    if len(matrix) != size:
        raise ValueError(f"rotation: {size} is no power of 4.")
    return matrix / math.sqrt(size)


_matrices = {}  # by size, device and type: a copy to the device in every call would wait for it


def rotate(x, size):
    """Rotate the last dimension of x [..., C] in blocks of `size`, which divides C."""
    key = size, x.device, x.dtype
    if key not in _matrices:
        _matrices[key] = hadamard(size).to(x)
    return (x.unflatten(-1, (-1, size)) @ _matrices[key]).flatten(-2)


def rotation_size(inputs):
    """Return the largest block in which as many inputs can be rotated, 0 where there is none."""
    return next((size for size in (256, 64, 16) if inputs % size == 0), 0)


def _scaled_integers(rows, scale, limit):
    return (rows / scale).round_().clamp_(-limit, limit)


def rounded(rows, scale, kind):
    """Return rows over scales that broadcast over them, rounded to what the kind has, as float32."""
    limit = LIMITS[kind]
    if kind == "fp8":
        return (rows / scale).clamp_(-limit, limit).to(torch.float8_e4m3fn).float()
    return _scaled_integers(rows, scale, limit)


def scales(rows, limit, search=False):
    """Return float32 [..., 1] for rows [..., C]: the largest magnitude over the limit, or the scale of least squared error."""
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


def quantize_rows(rows, fmt):
    """Quantize rows [O, K]: (values int8 or float8 [O, K], scale float32 [O, G]); G is the number of groups.

    The paper's weights are kind int8 or int4, group_size 0, search.
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


def in_groups(rows, group_size):
    """Return rows [O, K] as [O, G, K / G], of the inputs that share a scale."""
    return rows.unflatten(1, (-1, group_size)) if group_size else rows[:, None]


def rounded_in(rows, scale, fmt):
    """Return what `rounded` does, of a format."""
    return two_scales.nearest(rows / scale) if fmt.two_scales else rounded(rows, scale, fmt.kind)


def fitting_scales(rows, fmt):
    """Return the scales float32 [O, G] that the largest numbers of rows [O, K] fit."""
    if fmt.kind == "fp8":
        return scales(rows.reshape(1, -1), LIMITS[fmt.kind]).expand(len(rows), 1)
    groups = in_groups(rows, fmt.group_size)
    return two_scales.fitting(groups) if fmt.two_scales else scales(groups, LIMITS[fmt.kind])[..., 0]


def stood_for(values, scale, fmt):
    """Return in float32 what values [O, K] over scales [O, G] stand for."""
    groups = values.float().unflatten(1, (scale.shape[1], -1))
    if not fmt.two_scales:
        return (groups * scale[..., None]).flatten(1)
    return two_scales.stood_for(groups, *(part[..., None] for part in two_scales.numbers(scale))).flatten(1)


def rounded_like(rows, scale, fmt):
    """Return (values float32 [O, K], scale float32 [O, G]) of rows [O, K] rounded to the nearest: over the scales that there
    are, or, where these would clip so much that the error is less with it, over one that the largest number fits.
    """
    groups, kept, fitting = in_groups(rows, fmt.group_size), scale[..., None], fitting_scales(rows, fmt)[..., None]
    values, others = (rounded_in(groups, one, fmt) for one in (kept, fitting))
    level = two_scales.levels if fmt.two_scales else torch.Tensor.float
    error, other = (
        (level(part) * one - groups).square().sum(-1, keepdim=True) for part, one in ((values, kept), (others, fitting))
    )
    if fmt.kind == "fp8":  # which has one scale for the whole weight
        error, other = (part.sum().expand_as(kept) for part in (error, other))
    clipped = (other < error) & (fitting > CLIPS_FROM[fmt.kind] * kept)
    if fmt.two_scales:  # the others of a channel go with what its largest has
        kept = two_scales.snapped(torch.where(clipped, fitting, kept)[..., 0])[..., None]
        return rounded_in(groups, kept, fmt).flatten(1), kept[..., 0]
    return torch.where(clipped, others, values).flatten(1), torch.where(clipped, fitting, kept)[..., 0]


def pack_nibbles(values):
    """Return uint8 [O, ceil(K / 2)] of int8 [O, K] of -8 to 7: two to a byte, the first in the lower half."""
    values = torch.nn.functional.pad(values, (0, values.shape[1] % 2)).view(torch.uint8)
    return (values[:, ::2] & 0xF) | (values[:, 1::2] << 4)


def unpack_nibbles(packed, inputs):
    """Return int8 [O, inputs] of what `pack_nibbles` made."""
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(1)[:, :inputs].contiguous()


def scaled_values(values, scale, dtype):
    """Return int8 or float8 values, or such in floating point, times float32 scales, which broadcast over them, in `dtype`: the
    float32 product, rounded. There is no float32 copy of it on a GPU; float16 and bfloat16 hold the values themselves exactly.
    """
    return values.to(dtype, copy=True).mul_(scale)


def joined(*branches):
    """Return factors (out [O, r], into [r, K]) of several branches as those of one. Some may be None; where all are, None."""
    found = [factors for factors in branches if factors is not None]
    if len(found) < 2:
        return found[0] if found else None
    return torch.cat([out for out, _ in found], dim=1), torch.cat([into for _, into in found])


def _aligned(nbytes):
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Packing:
    """Where in one tensor of bytes (int8 [nbytes]) the integers, the scales and the factors of a weight are.

    shape: the weight's, [O, C] of a Linear or [O, C, kh, kw] of a Conv2d layer. format: a WeightFormat; what the shape does not
    allow (groups, rotation) it does without.
    """

    def __init__(self, shape, fmt):
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

    def pack(self, stored, factors=None):
        """Return int8 [nbytes] of what `stored` gives, and of factors as `factors` gives them, of any rank."""
        rank = factors[0].shape[1] if factors else 0
        packed = torch.zeros(self._nbytes_with(rank), dtype=torch.int8, device=stored[0].device)
        for place, tensor in zip((*self.stored(packed), *(self.factors(packed) or ())), (*stored, *(factors or ()))):
            place.copy_(tensor)
        return packed

    @property
    def most_rank(self):
        """The highest rank of given factors, such as a LoRA's, that are added to the branch: LEAST_LIMIT, or that at which they
        take what the weight takes in 16 bits.
        """
        return max(LEAST_LIMIT, self.rows * self.inputs // (self.rows + self.inputs))

    @property
    def most_rank_found(self):
        """The highest rank of factors that are found for a change, and may leave something out: LEAST_LIMIT_FOUND, or that at
        which they take a quarter of what the weight takes in 16 bits.
        """
        return max(LEAST_LIMIT_FOUND, self.rows * self.inputs // (4 * (self.rows + self.inputs)))

    def _nbytes_with(self, rank):
        return self._factors_at + 2 * rank * (self.rows + self.inputs) if rank else self._scales_end

    def stored(self, packed):
        """Return views into a packed weight: what is stored, int8 or float8 [O, K] or, of int4, uint8 [O, ceil(K / 2)]; and the
        scales, float32 [O, G], or, of two scales, those of channels, float32 [O, 1], and the shares, uint8 [O, G].
        """
        values = packed[: self.rows * self._row_bytes].view(self._dtype).view(self.rows, self._row_bytes)
        scale = packed[self._scales_at : self._shares_at].view(torch.float32).view(self.rows, -1)
        if not self.format.two_scales:
            return values, scale
        return values, scale, packed[self._shares_at : self._scales_end].view(torch.uint8).view(self.rows, self.groups)

    def scale(self, packed):
        """Return the scales, float32 [O, G], of a packed weight's groups."""
        _, scale, *shares = self.stored(packed)
        return two_scales.group_scales(*shares, scale) if shares else scale

    def factors(self, packed):
        """Return views into a packed weight: the low-rank branch's factors [O, r] and [r, K], whose product is to be added to
        the weight, not rotated. None where there is no such branch.
        """
        rank = self.rank(packed)
        if not rank:
            return None
        factors = packed[self._factors_at :].view(FACTOR_DTYPES[self.format.factors])
        return factors[: self.rows * rank].view(self.rows, rank), factors[self.rows * rank :].view(rank, self.inputs)

    def rank(self, packed):
        """Return the rank of a packed weight's branch, as its length tells it: more than the format's with changes in it."""
        return max(packed.numel() - self._factors_at, 0) // (2 * (self.rows + self.inputs))

    def values(self, packed):
        """Return (int8 or float8 [O, K], scale float32 [O, G], of two scales [O, 1]) of a packed weight, as it is computed
        with.
        """
        return self.unpacked(self.stored(packed))

    def unpacked(self, stored):
        """Return what `values` does of what `stored` returns."""
        integers, scale, *shares = stored
        values = unpack_nibbles(integers, self.inputs) if self.format.kind == "int4" else integers
        return two_scales.integers(values, *shares) if shares else values, scale

    def quantize(self, weight):
        """Return a weight in floating point, of `shape`, packed; its format is not calibrated."""
        return self.packed_rows(*quantize_rows(self.rotated(self.matrix(weight.detach().float())), self.format))

    def changed(self, weight, packed):
        """Return a packed weight changed into another weight in floating point, of `shape`.

        A change of a low rank is added to the branch, and integers and scales stay as they are. One of a higher rank goes into
        the integers, where these keep it (ENOUGH): then it is as if it had been there before the weight was quantized. Else
        the branch takes as much as `most_rank_found` allows, and the integers what they can of the rest.
        """
        wanted, packed = self.matrix(weight.detach().float()), packed.to(weight.device)
        change = wanted - self.matrix(self.dequantize(packed))
        negligible = max(NEGLIGIBLE * change.norm().item(), NOISE * wanted.norm().item())
        quick = min(QUICK_RANK, self.most_rank_found)
        *factors, rest = factored(change, quick, negligible)
        if rest.norm() > negligible:
            alone = self.rounded_anew(wanted, packed)
            kept = change - (wanted - self.matrix(self.dequantize(alone)))
            if (change * kept).sum() >= ENOUGH * change.square().sum():
                return alone
            if quick < self.most_rank_found:
                *factors, rest = factored(change, self.most_rank_found, negligible)
        if rest.norm() > negligible:
            return self.rounded_anew(wanted, packed, factors)
        return self.with_branch(packed, factors)

    def with_branch(self, packed, factors):
        """Return a packed weight with factors [O, r] and [r, K] added to its branch."""
        return self.pack(self.stored(packed), self._with_factors(packed, factors))

    def _with_factors(self, packed, added):
        """Return the factors of a packed weight's branch with others beside them; None where there are none."""
        factors, most = joined(self.factors(packed), added), min(self.rows, self.inputs)
        if factors is None or factors[0].shape[1] <= most:
            return factors
        return factored(self._branch(factors), most, 0.0)[:2]  # no matrix of this shape needs as many directions

    def thin(self, out, into):
        """Return factors [O, r] and [r, K] as a branch has them."""
        dtype = FACTOR_DTYPES[self.format.factors]
        return tuple(factor.to(dtype) for factor in balanced(out, into))

    def rounded_anew(self, rows, packed, added=None):
        """Return a packed weight whose branch, with the factors `added`, stays, and whose integers make rows of it, float32
        [O, K]. Its scales stay too, but where the format has others for other weights and nothing was added.
        """
        factors, scale = self._with_factors(packed, added), self.scale(packed)
        rows = self.rotated(rows - self._branch(factors) if factors else rows)
        keeps_scales = self.format.calibrated or added
        found = rounded_like(rows, scale, self.format) if keeps_scales else quantize_rows(rows, self.format)
        return self.packed_rows(*found, factors)

    def packed_rows(self, values, scale, factors=None):
        """Return int8 [nbytes] of values within the kind's, [O, K] in any type, rotated where the format is, scale float32 [O,
        G], as the format can have it, and factors.
        """
        if self.format.kind == "int4":
            values = pack_nibbles(values.to(torch.int8))
        scales = reversed(two_scales.split(scale)) if self.format.two_scales else (scale,)
        return self.pack((values.to(self._dtype), *scales), factors)

    def dequantize(self, packed, dtype=torch.float32):
        """Return a packed weight in `dtype`, of `shape`."""
        rows, factors = self.rotated(self.scaled(packed)), self.factors(packed)
        if factors is not None:
            rows = rows + self._branch(factors)
        return self.shaped(rows).to(dtype)

    def rotated(self, rows):
        """Return rows [O, K] rotated where the format is; those that are rotated, as they were."""
        return rotate(rows, self.format.rotation) if self.format.rotation else rows

    @staticmethod
    def _branch(factors):
        out, into = factors
        return out.float() @ into.float()

    def scaled(self, packed, dtype=torch.float32):
        """Return integers times scales, [O, K] in `dtype`, without the low-rank branch; a rotated weight stays rotated."""
        return self.times_scales(*self.values(packed), dtype)

    def times_scales(self, values, scale, dtype):
        """Return what `scaled` does of what `values` returns."""
        return scaled_values(values.unflatten(1, (scale.shape[1], -1)), scale[..., None], dtype).flatten(1)

    def matrix(self, weight):
        """Return a weight of `shape`, or of other layers of as many inputs, as rows [O, K]."""
        return weight.flatten(1) if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

    def shaped(self, rows):
        """Return rows [O, K] as a weight of `shape`, other rows as one of as many outputs: a view."""
        if len(self.shape) == 2:
            return rows
        _, channels, height, width = self.shape
        return rows.view(-1, height, width, channels).permute(0, 3, 1, 2)
