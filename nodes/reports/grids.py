"""Images of sampling runs beside each other with captions, as RGB arrays."""

import functools
import itertools
import math
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .fonts import Letters, drawable

SHOWN = 8  # images of a batch at most
GAP = 8  # pixels between cells

WIDTH, HEIGHT = 2048, 3072  # of a side-by-side picture at most; the captions' height comes on top
LARGEST = 320  # side of its cells at most


def _wrapped(text, font, width):
    """Return the text, in letters that can be drawn, with each of its lines broken where it would be wider than `width` pixels.

    font: Letters.
    """

    def fits(lines):
        return all(font.getlength(line) <= width for line in lines)

    def broken(line):
        ways = (textwrap.wrap(line, count) for count in range(len(line), 0, -1))
        return next((lines for lines in ways if fits(lines)), list(line))

    return "\n".join("\n".join(broken(line)) for line in drawable(text).splitlines() if line)


def cell_size(shape, tile):
    """Return the (width, height) at which an image of `shape` [H, W, ...] is shown in a cell of about `tile` pixels' width:
    a whole multiple of its own, or scaled down.
    """
    height, width = shape[:2]
    if width <= tile:
        return width * (tile // width), height * (tile // width)
    return tile, max(1, round(tile * height / width))


def _cell(image, tile):
    """Return float [H, W, 3], cut to 0..1, as a picture of `cell_size`; what is enlarged has its pixels repeated."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    size = cell_size(image.shape, tile)
    return picture.resize(size, Image.NEAREST if size[0] >= picture.width else Image.LANCZOS)


def image_grid(rows):
    """Draw one row of images per run with its caption at the left; uint8 [H, W, 3].

    rows: list of (caption, images), images float [B, H, W, 3] in 0..1; eight of a row at most are shown, at about 100 pixels'
    width, or more where they are few.
    """
    rows = [(caption, images[:SHOWN]) for caption, images in rows]
    font = Letters(28)
    columns = max(len(images) for _, images in rows)
    tile = max(96, min(256, 800 // columns, 3072 // len(rows)))
    width, height = cell_size(rows[0][1][0].shape, tile)
    captions = [_wrapped(caption, font, 384) for caption, _ in rows]
    text_width = 2 * GAP + math.ceil(max(font.getlength(line) for caption in captions for line in caption.splitlines()))
    height = max(height, *map(font.height, captions)) + GAP
    grid = Image.new("RGB", (text_width + columns * (width + GAP), len(rows) * height), "white")
    draw = ImageDraw.Draw(grid)
    for row, (caption, (_, images)) in enumerate(zip(captions, rows)):
        middle = row * height + height // 2
        font.write(draw, (GAP, middle), caption, "lm")
        for column, image in enumerate(images):
            cell = _cell(image, tile)
            grid.paste(cell, (text_width + column * (width + GAP), middle - cell.height // 2))
    return np.asarray(grid)


class Layout(NamedTuple):
    """Where the cells of a side-by-side picture are. others: runs beside the reference in a band. beside: differences are at
    the right of their images, else beneath. tile: the cells' width.
    """

    others: int
    beside: bool
    tile: int

    @property
    def columns(self):
        """Cells in a row."""
        return 1 + self.others * (1 + self.beside)

    def column(self, run):
        """Return the column of a run that is the `run`-th of its band, the reference being 0."""
        return run and 1 + (run - 1) * (1 + self.beside)


def layout(runs, images, shape):
    """Return the Layout with the largest cells.

    runs: their number, with the reference. images: of each run. shape: of an image, [H, W, ...].
    """
    aspect = shape[0] / shape[1]
    found = []
    for others, beside in itertools.product(range(1, runs), (True, False)):
        columns, rows = Layout(others, beside, 0).columns, math.ceil((runs - 1) / others) * images * (2 - beside)
        sides = (WIDTH - GAP) // columns - GAP, (HEIGHT // rows - GAP) / aspect, LARGEST / max(1, aspect)
        found.append(Layout(others, beside, max(16, int(min(sides)))))
    return max(found, key=lambda one: (one.tile, one.others))


def side_by_side(captions, images, gain):
    """Draw the runs' images in columns under their captions, and at each `gain` times its absolute difference to the first
    run's; uint8 [H, W, 3].

    captions: a text each, at least two. images: float [B, H, W, 3] in 0..1 each, the first the reference; eight are shown at
    most. Where the runs do not fit in a row, they are in several bands, and the reference is in each.
    """
    images = [batch[:SHOWN] for batch in images]
    shape = images[0].shape[1:]
    plan = layout(len(images), len(images[0]), shape)
    width, height = (side + GAP for side in cell_size(shape, plan.tile))
    right, down = (width, 0) if plan.beside else (0, height)  # from an image to its difference
    font = Letters(max(14, min(plan.columns * width // 48, width // 8)))
    captions = [_wrapped(caption, font, width - GAP) for caption in captions]
    told = _wrapped(f"difference x\u00a0{gain:g}", font, width - GAP)
    head = max(map(font.height, (told, *captions))) + 4 * GAP
    band = head + len(images[0]) * (height + down)
    starts = range(1, len(images), plan.others)
    picture = Image.new("RGB", (GAP + plan.columns * width, len(starts) * band), "white")
    write = functools.partial(font.write, ImageDraw.Draw(picture))
    for top, start in zip(range(0, picture.height, band), starts):
        for place, run in enumerate((0, *range(start, min(start + plan.others, len(images))))):
            left = GAP + plan.column(place) * width
            write((left, top + head - GAP), captions[run], "ld")
            if run and plan.beside:
                write((left + right, top + head - GAP), told, "ld")
            for row, (image, reference) in enumerate(zip(images[run], images[0])):
                y = top + head + row * (height + down)
                picture.paste(_cell(image, plan.tile), (left, y))
                if run:
                    picture.paste(_cell(gain * np.abs(image - reference), plan.tile), (left + right, y + down))
                elif not plan.beside:
                    write((left + width // 2, y + down + height // 2), told, "mm")
    return np.asarray(picture)
