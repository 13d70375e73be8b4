"""Choose the tiles of an int8 product on a GPU, and the number of programs per tile. The choice is arithmetic, without Triton.

The rates of products are from data sheets, and the rates of the L2 cache are estimates. They rank the choices for a layer; they
do not predict its speed.
"""

import itertools
import math
from dataclasses import dataclass

GROUP = 8  # rows of tiles that are computed together
MOST_STAGES = 4
# Time of a program besides its products, in clocks of a multiprocessor: waiting for the first operands, and storing.
OVERHEAD = 2000
MOST_SPLITS = 16
# m and n of tiles. In the loop of smaller tiles, a fifth or more of the instructions would not be products.
SIZES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64))


@dataclass(frozen=True)
class Architecture:
    """Rates and limits of a GPU's multiprocessor.

    products: int8 multiply-adds per clock. cache: bytes per clock from the L2 cache, while all multiprocessors read. shared:
    bytes of shared memory that a program may use. keeps_all: whether a pipeline of n stages has n tiles of each operand in
    shared memory, instead of n - 1 (Hopper's products read operands from shared memory).
    """

    products: int
    cache: int
    shared: int
    keeps_all: bool = False


# By compute capability; a capability that is not listed uses the nearest one below it.
ARCHITECTURES = {
    80: Architecture(2048, 40, 163 * 1024),
    86: Architecture(1024, 20, 99 * 1024),
    87: Architecture(1024, 20, 163 * 1024),
    89: Architecture(1024, 16, 99 * 1024),
    90: Architecture(4096, 26, 227 * 1024, keeps_all=True),
    100: Architecture(2048, 26, 227 * 1024),  # Triton has no int8 products for its tensor memory, and uses Ampere's
    120: Architecture(1024, 16, 99 * 1024),
}


@dataclass(frozen=True)
class Tile:
    """The part of a product that one program computes: out [m, n], with k channels of a tap per step. warps, stages: Triton's
    num_warps and num_stages.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


INTERPRETED = Tile(64, 32, 32, 4, 1)  # the interpreter is slow for each program


@dataclass(frozen=True)
class Product:
    """The sizes of an implicit matrix product: rows B * H' * W', outputs O, channels C of each tap, and taps kh * kw."""

    rows: int
    outputs: int
    channels: int
    taps: int

    def programs(self, tile: Tile) -> int:
        """Return the number of tiles, which is the number of programs if they do not share tiles."""
        return math.ceil(self.rows / tile.m) * math.ceil(self.outputs / tile.n)

    def steps(self, tile: Tile) -> int:
        """Return the number of steps of the loop over taps and blocks of channels."""
        return self.taps * math.ceil(self.channels / tile.k)


def architecture(capability: int) -> Architecture:
    """Return the Architecture of a compute capability, such as 89. Raises KeyError below 80."""
    known = max((one for one in ARCHITECTURES if one <= capability), default=capability)
    return ARCHITECTURES[known]


def depth(channels: int) -> int:
    """Return the size k of a block of channels: the largest that divides the channels, else one that wastes little."""
    return next((block for block in (128, 64, 32) if channels % block == 0), 64 if channels > 64 else 32)


def tiles(capability: int, channels: int) -> list[Tile]:
    """Return the Tiles for a compute capability and a number of channels, those with most reuse first. If k does not divide the
    channels, they are masked; then the largest tiles are left out, because they would need too many registers.
    """
    spec, k = architecture(capability), depth(channels)
    sizes = [(m, n) for m, n in SIZES if channels % k == 0 or m * n <= 128 * 128]
    return [Tile(m, n, k, 8 if m * n >= 128 * 128 else 4, _stages(spec, (m + n) * k)) for m, n in sizes]


def _stages(spec: Architecture, size: int) -> int:
    held = spec.shared // size
    return min(MOST_STAGES, held if spec.keeps_all else held + 1)


def clocks(product: Product, tile: Tile, splits: int, processors: int, spec: Architecture) -> float:
    """Return an estimate of a product's time in clocks, for `splits` programs per tile on `processors` multiprocessors of an
    Architecture. It is the time of the busiest multiprocessor; in each step, the slower of products and loads counts.
    """
    steps = product.steps(tile) // splits
    step = max(tile.m * tile.n * tile.k / spec.products, (tile.m + tile.n) * tile.k / spec.cache)
    time: float = math.ceil(product.programs(tile) * splits / processors) * (steps * step + OVERHEAD)
    if splits > 1:  # a second launch; partial sums of 4 bytes are written and read
        time += OVERHEAD + 2 * 4 * splits * product.rows * product.outputs / (spec.cache * processors)
    return time


def choose(product: Product, capability: int, processors: int) -> tuple[Tile, int]:
    """Return (Tile, splits) with the least `clocks` for a Product on a GPU. splits: number of programs per tile. capability: of
    the GPU, such as 89. processors: number of its multiprocessors.
    """
    spec = architecture(capability)
    choices = itertools.product(tiles(capability, product.channels), range(1, MOST_SPLITS + 1))
    fitting = [(tile, splits) for tile, splits in choices if product.steps(tile) % splits == 0]
    return min(fitting, key=lambda choice: clocks(product, choice[0], choice[1], processors, spec))
