"""Files of ours in the host's model folders."""

import contextlib
import os
import pathlib
import threading
import uuid

import folder_paths

from ...iec_core.file_kinds import kind_of
from ...iec_core.safetensors_header import reason

SUFFIX = ".safetensors"
FORBIDDEN = set('<>:"|?*')  # in names on Windows, where a colon leads to another drive
PORTS = [port + number for port in ("COM", "LPT") for number in "0123456789¹²³"]
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *PORTS}
MOST_BYTES = 200  # of a part of a name: file systems take 255, and a file that is half written has a longer one
MOST_BYTES_IN_ALL = 1000
JOINERS = str.maketrans("", "", "\u200c\u200d")  # words of some scripts, and emoji, have these

_replacing = threading.Lock()


def _parts(name):
    """Return the parts of a name: folders, and the file's without its suffix."""
    return name.removesuffix(SUFFIX).replace("\\", "/").split("/")


def _fault(name):
    """Return why a name, with folders or without, is none on every system, else None."""
    if len(name.encode(errors="replace")) > MOST_BYTES_IN_ALL:
        return f"it has more than {MOST_BYTES_IN_ALL} bytes"
    return next((fault for part in _parts(name) if (fault := _fault_of_part(part))), None)


def _fault_of_part(part):
    """Return why a part of a path is no plain name on every system, else None."""
    if not part:
        return "a part of it is empty"
    if not part.translate(JOINERS).isprintable():
        return "it has a character that cannot be shown"
    if FORBIDDEN & set(part):
        return f"it has one of {' '.join(sorted(FORBIDDEN))}"
    if part.startswith("."):
        return "a part of it begins with a dot"
    if part.endswith((".", " ")):
        return "a part of it ends with a dot or a space"
    if part.split(".")[0].rstrip().upper() in DEVICES:
        return f"{part} is the name of a device on Windows"
    if len(part.encode()) > MOST_BYTES:
        return f"it has more than {MOST_BYTES} bytes"
    return None


def _shown(name):
    """Return a name as it can be shown in a sentence."""
    text = name if name.translate(JOINERS).isprintable() else ascii(name).strip("'\"")
    return text if len(text) <= 80 else f"{text[:80]}…"


class ModelFolder:
    """One of the host's model folders. key: as the host calls it. own: whether it is ours, models/<key>."""

    def __init__(self, key, own=False):
        self.key = key
        if own:
            folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))

    def names(self):
        """Return the names of the files that there are."""
        return [name for name in folder_paths.get_filename_list(self.key) if name.endswith(SUFFIX)]

    def path(self, name):
        """Return where a file of this name is. Raises ValueError where there is none."""
        path = folder_paths.get_full_path(self.key, name) if name in self.names() else None
        if path is None:
            raise ValueError(f"there is no such file in models/{self.key}")
        return path

    def changed(self, name):
        """Return when the file of this name was last written, "" for a name that comes over a link, None, and is not known."""
        return "" if name is None else os.path.getmtime(self.path(name))

    def read(self, option, name, read):
        """Return read(path) of the file of this name, which comes from the input `option`. Raises ValueError, with a sentence,
        where there is none, or none that can be read.
        """
        try:
            return read(self.path(name))
        except ValueError as error:
            raise ValueError(f"{option}: '{name}' is of no use: {error}.") from error

    def write(self, name, kind, write):
        """Let write(path) write a file of a kind (of `kind_of`), and return what it is called, models/<key>/<name>.safetensors.

        An older one is replaced at once, and stays if that fails; only a file of the same kind is replaced, nothing of the
        user's own. Raises ValueError, with a sentence, where it cannot be written.
        """
        place = self._place(name, kind)
        path = os.path.join(self._folder(), *place.parts)
        half = f"{path}.{uuid.uuid4().hex}.part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(half)
            with _replacing:
                self._place(name, kind)  # another file may have come there meanwhile
                os.replace(half, path)
        except OSError as error:
            raise ValueError(f"name: '{_shown(name)}' cannot be written to models/{self.key} ({reason(error)}).") from error
        finally:
            with contextlib.suppress(OSError):
                os.remove(half)
        return f"models/{self.key}/{place}"

    def beside(self, name):
        """Return where a file that is none of the listed ones lies beside them."""
        return os.path.join(self._folder(), name)

    def wrong_name(self, name, kind):
        """Return the sentence for a name under which no file of a kind can be written, else None. None comes over a link."""
        try:
            name is None or self._place(name, kind)
        except ValueError as error:
            return str(error)

    def missing(self, **names):
        """Return the sentence for the first input of names={input: name of a file} that there is none of, else None."""
        known = self.names()
        for option, name in names.items():
            if name is not None and name not in known:
                return f"{option}: there is no file '{name}' in models/{self.key}; there are: {', '.join(known) or 'none'}."

    def _place(self, name, kind):
        """Return where in the folder a file of a name is to be written, a PurePosixPath. Raises ValueError, with a sentence,
        for what is no name, or one that is taken.
        """
        if fault := _fault(name):
            raise ValueError(
                f"name: '{_shown(name)}' is no name for a file in models/{self.key}: {fault}; write one such as sd15_20_steps."
            )
        place = pathlib.PurePosixPath("/".join(_parts(name)) + SUFFIX)
        if taken := self._taken(place, kind):
            raise ValueError(f"name: '{_shown(name)}' is taken: {taken}; choose another name.")
        return place

    def _taken(self, place, kind):
        """Return, in words, what is at a place and not to be replaced by a file of a kind, else None."""
        own = self._folder()
        for parent in list(place.parents)[:-1]:
            if os.path.lexists(os.path.join(own, parent)) and not os.path.isdir(os.path.join(own, parent)):
                return f"models/{self.key}/{parent} is not a folder"
        if fault := _irreplaceable(os.path.join(own, place), kind):
            return f"models/{self.key}/{place} is {fault} and stays as it is"
        for folder in folder_paths.get_folder_paths(self.key):
            if os.path.realpath(folder) != own and os.path.lexists(os.path.join(folder, place)):
                return f"{_called(folder)}/{place} is there, and of two files of one name ComfyUI finds one only"
        return None

    def _folder(self):
        """Return the folder of the host's several that has the key's own name."""
        folders = folder_paths.get_folder_paths(self.key)
        return os.path.realpath(next((folder for folder in folders if os.path.basename(folder) == self.key), folders[0]))


def _irreplaceable(path, kind):
    """Return, in words, what is at a path where that is not a file of this pack and of a kind, else None."""
    if not os.path.lexists(path):
        return None
    if os.path.islink(path):
        return "a link"
    if os.path.isdir(path):
        return "a folder"
    found = kind_of(path) if os.path.isfile(path) else None
    if found != kind:
        return "not a file of this pack" if found is None else f"a {found}"
    return None if os.stat(path).st_mode & 0o222 else "read-only"


def _called(folder):
    """Return what a folder is called, without where on this machine it is."""
    folder, models = (pathlib.PurePath(os.path.abspath(path)) for path in (folder, folder_paths.models_dir))
    return f"models/{folder.relative_to(models).as_posix()}" if folder.is_relative_to(models) else folder.name
