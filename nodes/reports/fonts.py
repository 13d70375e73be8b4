"""Fonts for users' labels: the plots' own font, then other installed fonts, then code points for characters without a font."""

import functools
import itertools
import unicodedata
from typing import NamedTuple

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from ...iec_core.log import logger

OWN = "DejaVu Sans"  # matplotlib brings it
# Plain families with many characters, by the first words of their names. Other families are tried after these.
PREFERRED = (
    "Noto Sans", "Source Han Sans", "Microsoft YaHei", "PingFang", "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Meiryo",
    "Apple SD Gothic", "MS Gothic", "SimHei", "WenQuanYi", "Droid Sans Fallback", "NanumGothic", "Arial", "Segoe UI", "Tahoma",
    "Noto Emoji", "Symbola",
)  # fmt: skip
# Fonts that draw a box or nothing for each character, or have no outlines.
UNFIT = ("LastResort", "AdobeBlank", "ColorEmoji", "AppleColor")


class Face(NamedTuple):
    """One font in a file. index: its number in the file, which may hold several fonts."""

    family: str
    path: str
    index: int = 0


def best_faces(entries):
    """Return the Faces to try, best first, one per family. entries: matplotlib's entries of the installed fonts."""

    def rank(entry):
        number = next((number for number, name in enumerate(PREFERRED) if entry.name.startswith(name)), len(PREFERRED))
        weight = entry.weight if isinstance(entry.weight, int) else 400
        return number, entry.name, abs(weight - 400), entry.fname

    fit = [
        entry
        for entry in entries
        if entry.style == "normal" and not any(word in entry.name.replace(" ", "") for word in (*UNFIT, OWN.replace(" ", "")))
    ]
    faces = {}
    for entry in sorted(fit, key=rank):
        faces.setdefault(entry.name, Face(entry.name, entry.fname, getattr(entry, "index", 0)))
    return list(faces.values())


@functools.cache
def faces():
    """Return the installed Faces to try, best first."""
    return best_faces(fontManager.ttflist)


def _own():
    return Face(OWN, f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")


def covered(face, characters):
    """Return the subset of these characters that a Face has."""
    try:
        font = FT2Font(face.path, **({"face_index": face.index} if face.index else {}))
        return {one for one in characters if font.get_char_index(ord(one))}
    except (OSError, RuntimeError):  # the file was removed or cannot be read
        return set()


_known = {}  # {character: the Face that has it, None if no Face has it}


def _look_up(characters):
    """Find a Face for each of these characters and store it in `_known`."""
    wanted = set(characters) - set(_known)
    for face in (_own(), *faces()):
        if not wanted:
            return
        found = covered(face, wanted)
        _known.update(dict.fromkeys(found, face))
        wanted -= found
    _known.update(dict.fromkeys(wanted))


@functools.cache
def _tell_once():
    logger.warning(
        "no font on this machine has some characters of the labels; pictures show their numbers instead, such as "
        "U+4E2D. Install a font that has them, such as Noto Sans CJK."
    )


def _is_seen(character):
    """Return whether a character is visible itself, unlike marks that only change others, such as the joiners in an emoji."""
    is_selector = unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    return unicodedata.category(character) not in ("Cc", "Cf") and not is_selector


def drawable(text):
    """Return a user's text in characters that can be drawn.

    Other characters become their code points, such as U+4E2D+6587, so that runs can still be distinguished.
    """
    text = "\n".join(text.expandtabs(4).splitlines())
    _look_up(set(text) - {"\n"})
    parts = []
    for is_missing, run in itertools.groupby(text, lambda one: _known.get(one, one) is None):
        run = [one for one in run if not is_missing or _is_seen(one)]
        if is_missing and run:
            _tell_once()
            run = ["U+", "+".join(f"{ord(one):04X}" for one in run)]
        parts += run
    return "".join(parts)


def families(text):
    """Return the font families to draw a text with, the plots' own first."""
    _look_up(set(text) - {"\n"})
    return [OWN, *dict.fromkeys(face.family for one in text if (face := _known.get(one)) and face.family != OWN)]


class Letters:
    """Text drawing with Pillow: the plots' own font at a size in pixels, and other fonts for characters that it lacks."""

    def __init__(self, size):
        self._size = size
        self._fonts = {}
        self.line_height = sum(self._font(_own()).getmetrics())

    def _font(self, face):
        if face not in self._fonts:
            self._fonts[face] = ImageFont.truetype(face.path, self._size, face.index)
        return self._fonts[face]

    def _runs(self, line):
        """Split a line into runs of one font each: [(font, text)]."""
        _look_up(set(line))
        return [(self._font(face), "".join(run)) for face, run in itertools.groupby(line, lambda one: _known[one] or _own())]

    def getlength(self, line):
        """Return the width of a line in pixels."""
        return sum(font.getlength(text) for font, text in self._runs(line))

    def letters(self, line):
        """Return the width of a line in letters of average width, which is 0.6 of the size."""
        return self.getlength(line) / (0.6 * self._size)

    def height(self, text):
        """Return the height, in pixels, of a text of several lines."""
        return self.line_height * len(text.splitlines())

    def write(self, draw, place, text, anchor):
        """Draw a text of several lines in black. place: (x, y) of its Pillow anchor: left or middle, middle or bottom."""
        across, up = {"l": 0, "m": 0.5}[anchor[0]], {"m": 0.5, "d": 1}[anchor[1]]
        base = place[1] - up * self.height(text) + self._font(_own()).getmetrics()[0]
        for number, line in enumerate(text.splitlines()):
            x = place[0] - across * self.getlength(line)
            for font, run in self._runs(line):
                draw.text((x, base + number * self.line_height), run, fill="black", font=font, anchor="ls")
                x += font.getlength(run)
