"""In which tiles a product of int8 is computed on a GPU, and by how many programs each: a choice by arithmetic, without Triton.

The rates are the data sheets' (products) and estimates (what reaches a multiprocessor from the L2 cache): they order the
choices for a layer, and tell no speed.
"""

import itertools
import math
from dataclasses import dataclass

GROUP = 8  # rows of tiles that run together
MOST_STAGES = 4
# What a program takes beside its products, in clocks of a multiprocessor: until the first operands are there, and to store.
OVERHEAD = 2000
MOST_SPLITS = 16
# m and n of tiles. In smaller ones a fifth of the loop and more would be other instructions than products.
SIZES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64))


@dataclass(frozen=True)
class Architecture:
    """products: of int8, added up, that a multiprocessor makes in a clock. cache: bytes that reach it from the L2 cache in a
    clock, all of them reading. shared: bytes of shared memory that a program may take. keeps_all: whether a pipeline of n
    stages holds n tiles of each operand there, instead of n - 1 (Hopper's products read them from there).
    """

    products: int
    cache: int
    shared: int
    keeps_all: bool = False


# By compute capability; another one is taken as the nearest below it.
ARCHITECTURES = {
    80: Architecture(2048, 40, 163 * 1024),
    86: Architecture(1024, 20, 99 * 1024),
    87: Architecture(1024, 20, 163 * 1024),
    89: Architecture(1024, 16, 99 * 1024),
    90: Architecture(4096, 26, 227 * 1024, keeps_all=True),
    100: Architecture(2048, 26, 227 * 1024),  # Triton has no int8 products for its tensor memory, and takes Ampere's
    120: Architecture(1024, 16, 99 * 1024),
}


@dataclass(frozen=True)
class Tile:
    """A program computes out [m, n], k channels of a tap at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


INTERPRETED = Tile(64, 32, 32, 4, 1)  # the interpreter takes its time for each program


@dataclass(frozen=True)
class Product:
    """The sizes of an implicit matrix product: rows [B * H' * W'], outputs [O], channels [C] of each of so many taps."""

    rows: int
    outputs: int
    channels: int
    taps: int

    def programs(self, tile):
        """Return how many programs compute it in tiles, each by one."""
        return math.ceil(self.rows / tile.m) * math.ceil(self.outputs / tile.n)

    def steps(self, tile):
        """Return the length of the walk over taps and blocks of channels."""
        return self.taps * math.ceil(self.channels / tile.k)


def architecture(capability):
    """Return the Architecture of a compute capability such as 89, from 80 on; KeyError below."""
    known = max((one for one in ARCHITECTURES if one <= capability), default=capability)
    return ARCHITECTURES[known]


def depth(channels):
    """Return the block of channels for a tap of so many: the largest that divides them, else the one that wastes little."""
    return next((block for block in (128, 64, 32) if channels % block == 0), 64 if channels > 64 else 32)


def tiles(capability, channels):
    """Return the Tiles that a capability has for a layer with so many channels, those of most reuse first. Where channels are
    masked, the widest would need more registers than there are.
    """
    spec, k = architecture(capability), depth(channels)
    sizes = [(m, n) for m, n in SIZES if channels % k == 0 or m * n <= 128 * 128]
    return [Tile(m, n, k, 8 if m * n >= 128 * 128 else 4, _stages(spec, (m + n) * k)) for m, n in sizes]


def _stages(spec, size):
    held = spec.shared // size
    return min(MOST_STAGES, held if spec.keeps_all else held + 1)


def clocks(product, tile, splits, processors, spec):
    """Return about how many clocks a product takes in tiles, with the walk shared by so many programs, on `processors`
    multiprocessors of an Architecture: by what is slower, products or loads, of the busiest one.
    """
    steps = product.steps(tile) // splits
    step = max(tile.m * tile.n * tile.k / spec.products, (tile.m + tile.n) * tile.k / spec.cache)
    time = math.ceil(product.programs(tile) * splits / processors) * (steps * step + OVERHEAD)
    if splits > 1:  # partial sums, in 4 bytes, are written and read, in a launch of its own
        time += OVERHEAD + 2 * 4 * splits * product.rows * product.outputs / (spec.cache * processors)
    return time


def choose(product, capability, processors):
    """Return (Tile, splits) for a Product on a GPU: those of the least `clocks`."""
    spec = architecture(capability)
    choices = itertools.product(tiles(capability, product.channels), range(1, MOST_SPLITS + 1))
    fitting = [(tile, splits) for tile, splits in choices if product.steps(tile) % splits == 0]
    return min(fitting, key=lambda choice: clocks(product, *choice, processors, spec))
