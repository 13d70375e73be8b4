"""Pictures of sampling runs, as RGB arrays: the error-growth plot and the labelled image grid."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette: told apart with every common colour blindness.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", ":", "-.")


def error_growth(curves):
    """Draw the relative latent error over the steps, log scale; uint8 [H, W, 3].

    curves: list of (label, correction, errors), errors[i] the error at the start of step i, nan where there is none.
    A colour stands for a label, a line style for a correction.
    """
    labels = list(dict.fromkeys(label for label, _, _ in curves))
    corrections = dict.fromkeys(correction for _, correction, _ in curves)
    corrections = sorted(corrections, key=lambda correction: correction != "none")  # solid is uncorrected
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, correction, errors in curves:
        errors = np.where(np.asarray(errors) > 0, errors, np.nan)
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        style = STYLES[corrections.index(correction) % len(STYLES)]
        axes.plot(range(len(errors)), errors, color=colour, linestyle=style, label=f"{label}, IEC {correction}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("relative latent error to the reference run")
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def image_grid(rows, tile=96, columns=8):
    """Draw one row of images per run with its caption at the left; uint8 [H, W, 3].

    rows: list of (caption, images), images float [B, H, W, 3] in 0..1; at most `columns` of a row are shown. Images are
    scaled to a width of about `tile` pixels, by repeating pixels where that enlarges them.
    """
    gap, text_width, font = 4, 330, ImageFont.load_default(size=18)
    shown = [(caption, images[:columns]) for caption, images in rows]
    height = round(tile * shown[0][1].shape[1] / shown[0][1].shape[2])
    width = text_width + (tile + gap) * max(len(images) for _, images in shown)
    grid = Image.new("RGB", (width, (height + gap) * len(shown)), "white")
    draw = ImageDraw.Draw(grid)
    for row, (caption, images) in enumerate(shown):
        top = row * (height + gap)
        draw.multiline_text((8, top + height // 2), caption, fill="black", font=font, anchor="lm", spacing=6)
        for column, image in enumerate(images):
            picture = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
            method = Image.NEAREST if picture.width < tile else Image.LANCZOS
            grid.paste(picture.resize((tile, height), method), (text_width + column * (tile + gap), top))
    return np.asarray(grid)
