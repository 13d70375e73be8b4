"""Pictures of runs compared with a reference: the contents of their cells and axes, and how nodes show them."""

import math
import random

import numpy as np
import pytest
import torch
from pack import pack_module
from PIL import Image
from toy import PixelVAE


@pytest.fixture
def module(host):
    """Return module(name), which gives a module of the pack's nodes."""
    return lambda name: pack_module(f"nodes.reports.{name}")


def images(runs, batch, height, width):
    """Return random images [B, H, W, 3] per run, the others near the first."""
    draw = np.random.default_rng(runs)
    first = draw.random((batch, height, width, 3)).astype(np.float32)
    return [first, *(first + draw.normal(scale=0.05, size=first.shape).astype(np.float32) for _ in range(runs - 1))]


def eight_bits(image):
    return (np.clip(image, 0, 1) * 255).round()


# runs, batch, height, width, where differences are, bands, how often a pixel is repeated
GRIDS = [
    (2, 1, 32, 32, "beside", 1, 10),
    (2, 8, 32, 32, "beside", 1, 10),
    (5, 1, 32, 32, "beneath", 1, 10),
    (5, 2, 300, 200, "beside", 1, 1),
    (5, 9, 32, 32, "beside", 1, 6),
    (20, 1, 32, 32, "beneath", 4, 10),
    (20, 8, 32, 32, "beside", 3, 3),
    (20, 1, 200, 300, "beneath", 4, 1),
]


@pytest.mark.parametrize(("runs", "batch", "height", "width", "place", "bands", "times"), GRIDS)
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_grid_holds_the_images_and_their_differences(module, runs, batch, height, width, place, bands, times, gain):
    batches = images(runs, batch, height, width)
    picture = module("grids").side_by_side([f"run {i}\nIEC none" for i in range(runs)], batches, gain)
    assert picture.shape[1] <= 2048
    shown, gap, beside = min(batch, 8), 8, place == "beside"
    others = math.ceil((runs - 1) / bands)
    right, down = times * width + gap, times * height + gap
    assert picture.shape[1] == gap + right * (1 + others * (2 if beside else 1))
    band, rest = divmod(picture.shape[0], bands)
    assert rest == 0

    def cell(number, row, column):
        """Return the pixels in the row of cells that is the `row`-th from the end of a band."""
        top, left = (number + 1) * band - (row + 1) * down, gap + column * right
        pixels = picture[top : top + down - gap, left : left + right - gap]
        assert np.array_equal(pixels, pixels[::times, ::times].repeat(times, 0).repeat(times, 1))
        return pixels[::times, ::times]

    for run in range(1, runs):
        number, place_in_band = divmod(run - 1, others)
        for image in range(shown):
            row = shown - 1 - image
            if beside:
                found = cell(number, row, 0), cell(number, row, 1 + 2 * place_in_band), cell(number, row, 2 + 2 * place_in_band)
            else:
                at = 2 * row + 1, place_in_band + 1
                found = cell(number, at[0], 0), cell(number, *at), cell(number, at[0] - 1, at[1])
            first, other = batches[0][image], batches[run][image]
            for pixels, expected in zip(found, (first, other, gain * abs(other - first))):
                assert np.array_equal(pixels, eight_bits(expected))


@pytest.mark.parametrize("gain", [2.0, 64.0])
def test_grid_shows_the_gain(module, gain):
    """The images are white, so that everything black is a letter."""
    grids, white = module("grids"), [np.ones((1, 32, 32, 3), np.float32)] * 3

    def letters(**more):
        return (grids.side_by_side(["", "", ""], white, **more) < 128)[:-340].sum()  # the differences are black

    assert grids.layout(3, 1, (32, 32, 3)).beside
    assert letters(gain=1.0) != letters(gain=gain)


@pytest.mark.parametrize(("runs", "batch"), [(2, 1), (5, 8), (20, 1), (20, 8)])
def test_grid_of_large_images_is_scaled_down(module, runs, batch):
    grids, levels = module("grids"), np.linspace(0.2, 0.8, runs, dtype=np.float32)
    assert 80 <= grids.layout(runs, batch, (384, 512, 3)).tile <= 320
    batches = [np.full((batch, 384, 512, 3), level) for level in levels]
    picture = grids.side_by_side(["a name"] * runs, batches, 2.0)
    assert picture.shape[1] <= 2048 and picture.shape[0] <= 3600
    assert set(eight_bits(levels)) <= set(np.unique(picture))


@pytest.mark.parametrize("label", ["a", "W8A8 + DeepCache 5, of a model", "a_name_without_any_space_" * 4, "", "two  spaces"])
def test_no_caption_is_wider_than_its_column(module, label):
    grids = module("grids")
    font = module("fonts").Letters(20)
    text = grids._wrapped(f"{label}\nIEC all next lambda 0.3 K 3", font, 130)
    assert "".join(text.split()) == "".join(f"{label}IEC all next lambda 0.3 K 3".split())
    assert all(font.getlength(line) <= 130 for line in text.splitlines())


PAIRS = {
    "demo": [("heun", "none")]
    + [(label, correction) for label in "abcde" for correction in ("none", "auto", "ends:1/10", "all next")],
    "labels": [(f"run ({i})", "none") for i in range(20)],
    "corrections": [("run", f"first:{i}") for i in range(20)],
    "many": [(f"run {i}", f"first:{j}") for i in range(10) for j in range(10)],
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_no_two_curves_look_alike(module, pairs):
    looks = module("plots")._looks(pairs)
    assert len(set(looks)) == len(pairs)
    if len({label for label, _ in pairs}) > 1:
        styles = {style for (_, correction), (_, style, _) in zip(pairs, looks) if correction == "none"}
        assert styles <= {"-"}  # a solid line is uncorrected


def test_runs_with_equal_names_get_different_labels(module, reports):
    full, other = reports
    names = module("compare").told_apart([full, other, other, full, other])
    assert names == [
        ("full", "none"), ("other", "all"), ("other (2)", "all"), ("full (2)", "none"), ("other (3)", "all"),
    ]  # fmt: skip


def caught(monkeypatch, module, name):
    """Draw the plot as usual, and return a list that gets its arguments."""
    arguments, draw = [], getattr(module("plots"), name)

    def drawn(*args):
        arguments.extend(args)
        return draw(*args)

    monkeypatch.setattr(module("plots"), name, drawn)
    return arguments


def error(report, reference, step):
    a, b = report.latents[step].double(), reference.latents[step].double()
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).mean().item()


def test_error_plot_has_the_errors_of_every_step(host, module, sample, model, reports, monkeypatch):
    sample(model, reports, label="more steps", keep_latents=True, steps=5)
    curves = caught(monkeypatch, module, "error_growth")
    (plot,) = host.run("IECErrorPlot", reports=reports)
    (label, correction, errors), (_, _, final) = curves[0]
    assert (label, correction) == ("other", "all")
    assert errors == pytest.approx([error(reports[1], reports[0], step) for step in range(5)], rel=1e-9)
    assert errors[0] == 0 < errors[1]
    assert np.isnan(final[:-1]).all() and len(final) == 6
    assert final[-1] == pytest.approx(error(reports[2], reports[0], -1), rel=1e-9)
    assert plot.shape[0] == 1 and plot.shape[2] == 1040 and plot.shape[3] == 3


def test_a_single_final_error_is_visible(module):
    draw = module("plots").error_growth
    with_point, without = ([("a", "none", [math.nan] * 4 + [end])] for end in (0.1, math.nan))
    assert (draw(with_point) != draw(without))[:500].sum() > 100


@pytest.mark.parametrize(("cost", "read"), [("seconds", lambda run: run.seconds), ("evaluations", lambda run: run.nfe)])
def test_pareto_plot_has_costs_and_errors(host, module, sample, model, reports, monkeypatch, cost, read):
    sample(model, reports, label="two", keep_latents=True, steps=2)
    for run, seconds in zip(reports, (3.0, 2.0, 1.0)):
        run.seconds = seconds
    found = caught(monkeypatch, module, "pareto")
    (plot,) = host.run("IECParetoPlot", reports=reports, cost=cost)
    runs, front, reference, _ = found
    assert [run[:2] for run in runs] == [("other", "all"), ("two", "none")]
    assert [run[2] for run in runs] == [read(report) for report in reports[1:]]
    assert [run[3] for run in runs] == pytest.approx([error(report, reports[0], -1) for report in reports[1:]], rel=1e-9)
    assert reference == ("full", "none", read(reports[0]))
    assert front == ([1, 0] if runs[0][3] < runs[1][3] else [1])  # the run of two steps is cheaper by both measures
    assert plot.shape[0] == 1 and plot.shape[2] == 1040 and plot.shape[3] == 3


def test_pareto_plot_shows_a_run_with_zero_error(host, module, reports, monkeypatch):
    places = caught(monkeypatch, module, "_label_points")
    host.run("IECParetoPlot", reports=[reports[0], *reports], cost="evaluations")
    _, axes, ((_, none), (_, some)), texts, _ = places
    assert texts == ["full (2)\nIEC none, error 0", "other\nIEC all"]
    assert axes.get_ylim()[0] < none < some == pytest.approx(error(reports[1], reports[0], -1), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_labels_of_twenty_points_are_legible(module, seed):
    draw, sizes, bounds = random.Random(seed), [(24, 20)] * 20, (100, 100, 1000, 600)
    points = [(draw.uniform(120, 980), draw.uniform(120, 580)) for _ in range(12)]
    points += [(x + draw.uniform(-12, 12), y + draw.uniform(-12, 12)) for x, y in points[:8]]  # some nearly the same
    boxes, overlap = module("plots").place_labels(points, sizes, bounds, 9)
    assert overlap == 0
    for number, (left, bottom, right, top) in enumerate(boxes):
        assert (right - left, top - bottom) == pytest.approx((24, 20))
        assert left >= 100 and right <= 1000 and bottom >= 100 and top <= 600
        apart = [right <= a or c <= left or top <= b or d <= bottom for a, b, c, d in boxes[:number]]
        assert all(apart)
        assert not any(left < x < right and bottom < y < top for x, y in points)


def test_labels_without_free_space_are_reported_as_overlapping(module):
    boxes, overlap = module("plots").place_labels([(50, 50)] * 2, [(90, 90)] * 2, (0, 0, 100, 100), 5)
    assert len(boxes) == 2 and overlap > 0


@pytest.mark.parametrize(("runs", "numbered"), [(3, False), (19, True)])
def test_pareto_plot_names_runs_if_there_is_room(module, monkeypatch, runs, numbered):
    plots, texts = module("plots"), []
    write = plots._label_points
    monkeypatch.setattr(plots, "_label_points", lambda *args: texts.append((args[3], write(*args))) or texts[-1][1])
    draw = random.Random(0)
    points = [(f"a rather long name {i}", "all", 1 + i % 5 / 2, draw.uniform(0.1, 0.2)) for i in range(runs)]
    plots.pareto(points, [0], ("full", "none", 5.0), "seconds")
    written, legible = texts[-1]
    assert legible
    assert written == [str(i + 1) if numbered else f"a rather long name {i}\nIEC all" for i in range(runs)]


NODES = {"IECErrorPlot": {}, "IECImageGrid": {"vae": PixelVAE()}, "IECParetoPlot": {"cost": "seconds"}}


@pytest.mark.parametrize(("node", "inputs"), NODES.items())
def test_reports_that_make_no_picture_are_refused(host, sample, model, reports, node, inputs):
    with pytest.raises(ValueError, match=r"^reports: the number of runs is 1, but must be at least 2"):
        host.run(node, reports=reports[:1], **inputs)
    with pytest.raises(ValueError, match=r"^reports: the number of runs is 0, but must be at least 2"):
        host.run(node, reports=[], **inputs)
    sample(model, reports, label="bare", steps=1)
    with pytest.raises(ValueError, match=r"^reports: the run 'bare' kept no latents; only KSampler"):
        host.run(node, reports=reports, **inputs)


@pytest.mark.parametrize("gain", [0.5, 101.0, math.nan])
def test_a_linked_gain_is_checked_too(host, reports, gain):
    with pytest.raises(ValueError, match=r"^difference_gain: .* (is outside 1 to 100|is not a finite number from 1 to 100)\."):
        host.run("IECImageGrid", reports=reports, vae=PixelVAE(), difference_gain=gain)


def shown(node):
    """Return the pictures that a node shows on itself, uint8."""
    import folder_paths

    assert all(entry["type"] == "temp" for entry in node.ui["images"])
    paths = [f"{folder_paths.get_temp_directory()}/{entry['filename']}" for entry in node.ui["images"]]
    return [np.asarray(Image.open(path)) for path in paths]


@pytest.mark.parametrize(("node", "inputs"), [*NODES.items(), ("IECCompare", {"vae": PixelVAE()}), ("IECReport", {})])
def test_nodes_show_their_outputs(host, reports, node, inputs):
    cls = host.nodes[node]
    done = cls.execute(**{"report" if node == "IECReport" else "reports": reports}, **inputs)
    pictures = [one for output in done.result if isinstance(output, torch.Tensor) for one in output]
    on_node = shown(done)
    assert len(on_node) == len(pictures) > 0
    assert all(np.array_equal(picture, (255 * one).round()) for picture, one in zip(on_node, pictures))
    texts = [output for output in done.result if isinstance(output, str)]
    assert list(done.ui.get("text", [])) == texts
    assert cls.define_schema().is_output_node
