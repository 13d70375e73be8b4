"""The choice of tiles for a product: the estimated clocks are correct, and every GPU is kept busy."""

import math

import pytest

from iec_core.quantization.kernels import tiles
from iec_core.quantization.kernels.tiles import Product, Tile

MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 120: 170}
LAYERS = {  # of SDXL at 1024 x 1024 pixels, two items
    "320 at 128": Product(2 * 128 * 128, 320, 320, 9),
    "640 at 64": Product(2 * 64 * 64, 640, 640, 9),
    "1280 at 32": Product(2 * 32 * 32, 1280, 1280, 9),
    "2560 to 1280 at 32": Product(2 * 32 * 32, 1280, 2560, 9),
    "960 to 320 at 128": Product(2 * 128 * 128, 320, 960, 9),
}
SMALL = {"1280 at 16": Product(2 * 16 * 16, 1280, 1280, 9), "1280 at 8": Product(2 * 8 * 8, 1280, 1280, 9)}  # of SD 1.5


def test_programs_and_steps():
    product, tile = Product(rows=1000, outputs=320, channels=320, taps=9), Tile(128, 256, 64, 8, 4)
    assert product.programs(tile) == 8 * 2 and product.steps(tile) == 9 * 5
    assert Product(1, 1, 4, 9).programs(tile) == 1 and Product(1, 1, 4, 9).steps(tile) == 9
    assert Product(1, 1, 100, 1).steps(tile) == 2


def test_clocks_of_a_product_equal_a_worked_example():
    """There are two rounds of programs; loads determine the time of a step (384 * 64 / 26 = 945 > 128 * 256 * 64 / 4096
    = 512).
    """
    spec, tile = tiles.architecture(90), Tile(128, 256, 64, 8, 4)
    product = Product(rows=128 * 20, outputs=256 * 10, channels=320, taps=9)
    expected = 2 * (45 * 384 * 64 / 26 + tiles.OVERHEAD)
    assert tiles.clocks(product, tile, 1, 132, spec) == pytest.approx(expected)
    shared = math.ceil(200 * 3 / 132) * (15 * 384 * 64 / 26 + tiles.OVERHEAD)
    shared += tiles.OVERHEAD + 8 * 3 * 2560 * 2560 / (26 * 132)
    assert tiles.clocks(product, tile, 3, 132, spec) == pytest.approx(shared)


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("product", LAYERS.values(), ids=LAYERS)
def test_large_layers_keep_all_multiprocessors_busy(capability, product):
    """Useful work dominates: little of the last round is idle, and little of the tiles is outside the output."""
    tile, splits = tiles.choose(product, capability, MULTIPROCESSORS[capability])
    programs = product.programs(tile)
    rounds = math.ceil(programs * splits / MULTIPROCESSORS[capability])
    busy = programs * splits / (rounds * MULTIPROCESSORS[capability])
    wanted = product.rows * product.outputs / (programs * tile.m * tile.n)
    assert busy * wanted > 0.7, (tile, splits)


@pytest.mark.parametrize("capability", MULTIPROCESSORS)
@pytest.mark.parametrize("product", SMALL.values(), ids=SMALL)
def test_small_images_split_the_reduction_loop(capability, product):
    processors = MULTIPROCESSORS[capability]
    tile, splits = tiles.choose(product, capability, processors)
    assert splits > 1 and product.steps(tile) % splits == 0
    assert product.programs(tile) * splits > processors / 2 > product.programs(tile) / 2


def test_the_chosen_tile_is_optimal():
    product, spec = LAYERS["640 at 64"], tiles.architecture(80)
    chosen = tiles.clocks(product, *tiles.choose(product, 80, 108), 108, spec)
    assert all(
        chosen <= tiles.clocks(product, tile, splits, 108, spec) for tile in tiles.tiles(80, 640) for splits in (1, 3, 5, 9)
    )


@pytest.mark.parametrize("channels", [1, 3, 4, 32, 77, 96, 100, 320, 640, 960, 1280, 2560])
@pytest.mark.parametrize("capability", tiles.ARCHITECTURES)
def test_tiles_fit(capability, channels):
    """They fit into shared memory, with a pipeline. Divisors of the channels are preferred; otherwise little is wasted."""
    spec = tiles.architecture(capability)
    for tile in tiles.tiles(capability, channels):
        held = tile.stages if spec.keeps_all else tile.stages - 1
        assert held * (tile.m + tile.n) * tile.k <= spec.shared and 2 <= tile.stages <= 4
        assert channels % tile.k == 0 if channels % 32 == 0 else -channels % tile.k < 64


def test_an_unlisted_capability_uses_the_next_lower_one():
    assert tiles.architecture(121) is tiles.architecture(120) and tiles.architecture(103) is tiles.architecture(100)
    with pytest.raises(KeyError):
        tiles.architecture(75)
