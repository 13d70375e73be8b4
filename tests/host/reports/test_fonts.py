"""Labels in scripts that the plots' own font lacks: in another font of the machine, or as code points if there is none."""

import itertools
import logging
import types
import warnings

import matplotlib
import numpy as np
import pytest
from pack import pack_module
from PIL import Image, ImageDraw, ImageFont

FONTS = f"{matplotlib.get_data_path()}/fonts/ttf"  # matplotlib's own fonts
STIX = ("STIXGeneral", f"{FONTS}/STIXGeneral.ttf", 0)  # the plots' own font lacks its letters ⌚ and ⌽
LABELS = ["运行一", "运行二", "実行", "실행", "👩\u200d🚀", "\U00013000 é", "⌚⌽", "نموذج", "\ud800"]


@pytest.fixture
def module(host):
    """Return module(name), which gives a module of the pack's nodes."""
    return lambda name: pack_module(f"nodes.reports.{name}")


@pytest.fixture
def fonts(module, monkeypatch):
    """Return fonts(faces), which gives the module of fonts, on a machine with these fonts in addition to the plots' own."""

    def on(*faces):
        fonts = module("fonts")
        fonts._tell_once.cache_clear()
        monkeypatch.setattr(fonts, "_known", {})
        monkeypatch.setattr(fonts, "faces", lambda: [fonts.Face(*face) for face in faces])
        return fonts

    return on


def entry(name, weight=400, style="normal", fname="a.ttf"):
    """Return matplotlib's record of a font."""
    return types.SimpleNamespace(name=name, weight=weight, style=style, fname=fname, index=1)


def test_plain_upright_fonts_are_preferred_and_box_fonts_excluded(fonts):
    entries = [
        entry("A Decorative"), entry("Arial", style="italic", fname="i.ttf"), entry("Arial", 700, fname="b.ttf"),
        entry("Arial", fname="r.ttf"), entry("Noto Sans CJK SC", "normal"), entry("Noto Color Emoji"), entry("DejaVu Sans"),
        entry("Last Resort High-Efficiency"), entry(".LastResort"), entry("Adobe Blank"), entry("Apple Color Emoji"),
    ]  # fmt: skip
    expected = [("Noto Sans CJK SC", "a.ttf", 1), ("Arial", "r.ttf", 1), ("A Decorative", "a.ttf", 1)]
    assert fonts().best_faces(entries) == expected


def test_the_first_font_with_a_character_is_used(fonts, monkeypatch):
    fonts = fonts(("One", "1", 0), ("Two", "2", 0), ("Three", "3", 0))
    letters, asked = {"DejaVu Sans": "abc é", "One": "中aé", "Two": "中文", "Three": "中文字"}, []
    monkeypatch.setattr(fonts, "covered", lambda face, some: asked.append(face.family) or set(some) & set(letters[face.family]))
    assert fonts.families("abc é") == ["DejaVu Sans"] and asked == ["DejaVu Sans"]
    assert fonts.families("a中b文\nc") == ["DejaVu Sans", "One", "Two"] and asked[1:] == ["DejaVu Sans", "One", "Two"]
    assert fonts.families("中文") == ["DejaVu Sans", "One", "Two"] and len(asked) == 4  # each is looked up once
    assert fonts.drawable("a 中文字 b") == "a 中文字 b" and fonts.drawable("字仮b") == "字U+4EEEb"


def test_an_invalid_font_file_is_skipped(fonts, tmp_path):
    (tmp_path / "junk.ttf").write_bytes(b"junk")
    fonts = fonts(("Junk", str(tmp_path / "junk.ttf"), 0), ("Gone", str(tmp_path / "gone.ttf"), 0), STIX)
    assert fonts.families("⌚") == ["DejaVu Sans", "STIXGeneral"]


def test_without_a_font_characters_are_numbers(fonts, caplog):
    drawable = fonts().drawable
    with caplog.at_level(logging.WARNING):
        assert drawable("W8A8 é ж ش") == "W8A8 é ж ش" and caplog.messages == []
        assert drawable("运行 2\n⌚") == "U+8FD0+884C 2\nU+231A"
        assert drawable("👩\u200d🚀\ufe0f!").encode("ascii", "ignore") == b"U+1F469U+1F680!"  # joiners are not visible
        assert drawable("a\tb\x07\ud800") == "a   bU+D800"
    assert len(caplog.messages) == 1 and "U+4E2D" in caplog.messages[0]  # one message for all


def pictures(module, labels):
    """Return every kind of picture that has labels."""
    plots, white, grids = module("plots"), [np.ones((1, 16, 16, 3), np.float32)] * len(labels), module("grids")
    step = {"step": 0, "sigma": 1.0, "corrected": False, "nfe": 1, "cached": True, "contraction": []}
    step |= {"residuals": [], "fell_back": []}
    run = {"correction": "none", "nfe": 1, "seconds": 1.0, "cached_cost": 0.5, "steps": [types.SimpleNamespace(**step)]}
    points = [(label, "none", 1 + number, 1 / (1 + number)) for number, label in enumerate(labels)]
    yield plots.table([(label, "none", "1", "1", "1", "1") for label in labels])
    yield grids.image_grid(list(zip(labels, white)))
    yield grids.side_by_side(labels, white, 8.0)
    yield plots.error_growth([(label, "none", [0.0, error, error]) for label, _, error, _ in points])
    yield plots.pareto(points, [0], (labels[0], "none", 2), "s")
    yield plots.run_steps(types.SimpleNamespace(label=labels[0], **run))


def test_pictures_have_no_boxes_and_no_warnings(module, fonts, caplog, monkeypatch):
    """matplotlib warns of each glyph that it draws as a box; Pillow's letters are checked before they are drawn."""
    fonts, drawn, write = fonts(STIX), [], ImageDraw.ImageDraw.text

    def text(self, place, text, *args, **more):
        drawn.append((text, more["font"]))
        write(self, place, text, *args, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert len([*pictures(module, LABELS)]) == 6
    assert len(caplog.messages) == 1 and len(drawn) > 2 * len(LABELS)
    for text, font in drawn:
        face = next(face for face in (fonts._own(), *fonts.faces()) if face.path == font.path)
        assert fonts.covered(face, set(text)) == set(text), text
    assert any(text == "⌚⌽" for text, _ in drawn)


def test_labels_that_no_font_has_make_different_pictures(module, fonts):
    fonts()
    pairs = zip(pictures(module, ["运行一", "a"]), pictures(module, ["运行二", "a"]))
    for one, other in itertools.islice(pairs, 2):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize("text", ["⌚", "a⌚b⌽c"])
def test_fallback_letters_are_drawn_in_their_own_font(fonts, text):
    """The picture equals that of the letters drawn in the fonts themselves, side by side."""
    letters = fonts(STIX).Letters(40)
    own, other = (ImageFont.truetype(path, 40) for path in (f"{FONTS}/DejaVuSans.ttf", STIX[1]))
    picture, expected, x = Image.new("L", (240, 80), "white"), Image.new("L", (240, 80), "white"), 5
    for one in text:
        font = other if one in "⌚⌽" else own
        ImageDraw.Draw(expected).text((x, 50), one, fill="black", font=font, anchor="ls")
        x += font.getlength(one)
    assert letters.getlength(text) == pytest.approx(x - 5, abs=1)
    letters.write(ImageDraw.Draw(picture), (5, 50 + own.getmetrics()[1]), text, "ld")
    ink, difference = (255 - np.asarray(expected, float)).sum(), np.asarray(picture, float) - np.asarray(expected)
    assert ink > 1e4 and abs(difference).sum() < 0.02 * ink


def test_labels_that_are_alike_when_shortened_get_a_number(module, fonts):
    fonts()
    labels = ["long " * 10 + "a", "long " * 10 + "b", "运行标签版本一", "运行标签版本二", "short"]
    short = module("plots").shortened_apart(labels)
    assert list(short) == labels and len(set(short.values())) == len(labels) and short["short"] == "short"


@pytest.mark.parametrize("letter", ["W", "i", "a", "中", "⌚", "é "])
def test_no_label_is_wider_than_its_column(module, fonts, letter):
    """The width is measured in the fonts' letters, not by the number of characters."""
    fonts(STIX)
    measure = ImageFont.truetype(STIX[1] if letter == "⌚" else f"{FONTS}/DejaVuSans.ttf", 100).getlength
    for count in (1, 10, 300):
        whole, text = module("fonts").drawable(letter * count), module("plots").shortened(letter * count, 31)
        assert measure(text) <= 31 * 60 + 40  # its … may be wider in this font
        if measure(whole) <= 31 * 60:
            assert text == whole
        else:
            assert text.endswith("…") and measure(text) > 1700
