"""Grids of the images of sampling runs, with captions, as RGB arrays."""

import functools
import itertools
import math
import textwrap
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .fonts import Letters, drawable

SHOWN = 8  # the most images of a batch
GAP = 8  # pixels between cells

WIDTH, HEIGHT = 2048, 3072  # the largest side-by-side picture, in pixels, without the height of its captions
LARGEST = 320  # the largest side of its cells, in pixels


def _wrapped(text, font, width):
    """Return the text in characters that can be drawn, with lines broken to be at most `width` pixels wide.

    font: Letters.
    """

    def fits(lines):
        return all(font.getlength(line) <= width for line in lines)

    def broken(line):
        ways = (textwrap.wrap(line, count) for count in range(len(line), 0, -1))
        return next((lines for lines in ways if fits(lines)), list(line))

    return "\n".join("\n".join(broken(line)) for line in drawable(text).splitlines() if line)


def cell_size(shape, tile):
    """Return the (width, height) of an image of `shape` [H, W, ...] in a cell about `tile` pixels wide.

    It is a whole multiple of the image's size, or smaller than the image.
    """
    height, width = shape[:2]
    if width <= tile:
        return width * (tile // width), height * (tile // width)
    return tile, max(1, round(tile * height / width))


def _cell(image, tile):
    """Return float [H, W, 3], clipped to 0..1, as a picture of `cell_size`. To enlarge an image, its pixels are repeated."""
    picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    size = cell_size(image.shape, tile)
    return picture.resize(size, Image.NEAREST if size[0] >= picture.width else Image.LANCZOS)


def image_grid(rows):
    """Draw one row of images per run with its caption at the left; uint8 [H, W, 3].

    rows: list of (caption, images), images float [B, H, W, 3] in 0..1. At most eight images of a row are shown, each about 100
    pixels wide, or wider if there are few.
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
    """The places of the cells in a side-by-side picture.

    others: the number of runs next to the reference in a band, a row of runs. beside: whether differences are to the right of
    their images; otherwise they are below. tile: the cells' width in pixels.
    """

    others: int
    beside: bool
    tile: int

    @property
    def columns(self):
        """The number of cells in a row."""
        return 1 + self.others * (1 + self.beside)

    def column(self, run):
        """Return the column of the `run`-th run of a band; run 0 is the reference."""
        return run and 1 + (run - 1) * (1 + self.beside)


def layout(runs, images, shape):
    """Return the Layout with the largest cells.

    runs: the number of runs, with the reference. images: the number of images per run. shape: of an image, [H, W, ...].
    """
    aspect = shape[0] / shape[1]
    found = []
    for others, beside in itertools.product(range(1, runs), (True, False)):
        columns, rows = Layout(others, beside, 0).columns, math.ceil((runs - 1) / others) * images * (2 - beside)
        sides = (WIDTH - GAP) // columns - GAP, (HEIGHT // rows - GAP) / aspect, LARGEST / max(1, aspect)
        found.append(Layout(others, beside, max(16, int(min(sides)))))
    return max(found, key=lambda one: (one.tile, one.others))


def side_by_side(captions, images, gain):
    """Draw the runs' images in columns under their captions, each with its difference to the first run; uint8 [H, W, 3].

    The difference is absolute and multiplied by `gain`. captions: one text per run, at least two. images: float [B, H, W, 3] in
    0..1 per run, the first is the reference; at most eight are shown. Runs that do not fit in a row are drawn in several bands,
    each with the reference.
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
