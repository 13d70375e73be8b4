"""Letters for users' labels: the plots' own font, the machine's others for what it has not, code points where none has it."""

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
# Plain families with many letters, by the words that their names begin with; others are tried after them.
PREFERRED = (
    "Noto Sans", "Source Han Sans", "Microsoft YaHei", "PingFang", "Hiragino Sans", "Yu Gothic", "Malgun Gothic", "Meiryo",
    "Apple SD Gothic", "MS Gothic", "SimHei", "WenQuanYi", "Droid Sans Fallback", "NanumGothic", "Arial", "Segoe UI", "Tahoma",
    "Noto Emoji", "Symbola",
)  # fmt: skip
UNFIT = ("LastResort", "AdobeBlank", "ColorEmoji", "AppleColor")  # boxes or nothing for every character, or no outlines


class Face(NamedTuple):
    """A font of a file, which may hold several."""

    family: str
    path: str
    index: int = 0


def best_faces(entries):
    """Return the Faces to be tried, best first, one a family. entries: matplotlib's of the fonts that there are."""

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
    """Return the machine's Faces to be tried."""
    return best_faces(fontManager.ttflist)


def _own():
    return Face(OWN, f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf")


def covered(face, characters):
    """Return those of some characters that a Face has."""
    try:
        font = FT2Font(face.path, **({"face_index": face.index} if face.index else {}))
        return {one for one in characters if font.get_char_index(ord(one))}
    except (OSError, RuntimeError):  # it was removed, or is none that can be read
        return set()


_known = {}  # a character: the Face that has it, None where none has


def _look_up(characters):
    """Find out which Face has each of some characters."""
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
        "no font of this machine has some characters of the labels; pictures have their numbers instead, such as "
        "U+4E2D. Fonts such as Noto Sans CJK have them."
    )


def _is_seen(character):
    """Tell whether a character is more than a mark that changes others, as the parts of an emoji are joined by."""
    is_selector = unicodedata.name(character, "").startswith("VARIATION SELECTOR")
    return unicodedata.category(character) not in ("Cc", "Cf") and not is_selector


def drawable(text):
    """Return a user's text in characters that can be drawn. Others become their numbers, as U+4E2D+6587, so that runs are still
    told apart.
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
    """Return the families to draw a text in, the plots' own first."""
    _look_up(set(text) - {"\n"})
    return [OWN, *dict.fromkeys(face.family for one in text if (face := _known.get(one)) and face.family != OWN)]


class Letters:
    """What Pillow draws text with: the plots' own font at a size in pixels, and others for what it has not."""

    def __init__(self, size):
        self._size = size
        self._fonts = {}
        self.line_height = sum(self._font(_own()).getmetrics())

    def _font(self, face):
        if face not in self._fonts:
            self._fonts[face] = ImageFont.truetype(face.path, self._size, face.index)
        return self._fonts[face]

    def _runs(self, line):
        """Return [(font, text)] of a line."""
        _look_up(set(line))
        return [(self._font(face), "".join(run)) for face, run in itertools.groupby(line, lambda one: _known[one] or _own())]

    def getlength(self, line):
        """Return the pixels that a line takes."""
        return sum(font.getlength(text) for font, text in self._runs(line))

    def letters(self, line):
        """Return how many letters of average width, 0.6 of the size, a line is wide."""
        return self.getlength(line) / (0.6 * self._size)

    def height(self, text):
        """Return the pixels that a text of several lines takes."""
        return self.line_height * len(text.splitlines())

    def write(self, draw, place, text, anchor):
        """Draw a text of several lines in black. place: (x, y) of its left, top, middle or bottom, by Pillow's anchor."""
        across, up = {"l": 0, "m": 0.5}[anchor[0]], {"m": 0.5, "d": 1}[anchor[1]]
        base = place[1] - up * self.height(text) + self._font(_own()).getmetrics()[0]
        for number, line in enumerate(text.splitlines()):
            x = place[0] - across * self.getlength(line)
            for font, run in self._runs(line):
                draw.text((x, base + number * self.line_height), run, fill="black", font=font, anchor="ls")
                x += font.getlength(run)
