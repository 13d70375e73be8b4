"""Safe reading and writing of the pack's own files in the host's model folders."""

import contextlib
import os
import pathlib
import threading
import uuid

import folder_paths

from ...iec_core.file_kinds import kind_of
from ...iec_core.safetensors_header import reason

SUFFIX = ".safetensors"
FORBIDDEN = set('<>:"|?*')  # not allowed in names on Windows, where a colon leads to another drive
PORTS = [port + number for port in ("COM", "LPT") for number in "0123456789¹²³"]
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *PORTS}
MOST_BYTES = 200  # for a part of a name: file systems allow 255, and the name of a file that is being written is longer
MOST_BYTES_IN_ALL = 1000
JOINERS = str.maketrans("", "", "\u200c\u200d")  # not printable, but words of some scripts and emoji contain them

_replacing = threading.Lock()


def _parts(name):
    """Split a name into its parts: the folders, and the file name without suffix."""
    return name.removesuffix(SUFFIX).replace("\\", "/").split("/")


def _fault(name):
    """Return why a name, with or without folders, is not valid on every operating system, else None."""
    if len(name.encode(errors="replace")) > MOST_BYTES_IN_ALL:
        return f"it has more than {MOST_BYTES_IN_ALL} bytes"
    return next((fault for part in _parts(name) if (fault := _fault_of_part(part))), None)


def _fault_of_part(part):
    """Return why a part of a path is not a plain name on every operating system, else None."""
    if not part:
        return "a part of it is empty"
    if not part.translate(JOINERS).isprintable():
        return "it contains a character that cannot be shown"
    if FORBIDDEN & set(part):
        return f"it contains one of {' '.join(sorted(FORBIDDEN))}"
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
    """Return a name in a form that can be shown in a message."""
    text = name if name.translate(JOINERS).isprintable() else ascii(name).strip("'\"")
    return text if len(text) <= 80 else f"{text[:80]}…"


class ModelFolder:
    """One of the host's model folders. key: the host's name for it. own: whether it belongs to the pack (models/<key>)."""

    def __init__(self, key, own=False):
        self.key = key
        if own:
            folder_paths.add_model_folder_path(key, os.path.join(folder_paths.models_dir, key))

    def names(self):
        """Return the names of the existing .safetensors files."""
        return [name for name in folder_paths.get_filename_list(self.key) if name.endswith(SUFFIX)]

    def path(self, name):
        """Return the path of the file of this name. Raises ValueError if it does not exist."""
        path = folder_paths.get_full_path(self.key, name) if name in self.names() else None
        if path is None:
            raise ValueError(f"there is no such file in models/{self.key}")
        return path

    def changed(self, name):
        """Return when the file of this name was last written; "" if the name is None, because it comes over a link."""
        return "" if name is None else os.path.getmtime(self.path(name))

    def read(self, option, name, read):
        """Return read(path) for the file of this name, the value of the input `option`.

        Raises ValueError, with a sentence, if the file does not exist or cannot be read.
        """
        try:
            return read(self.path(name))
        except ValueError as error:
            raise ValueError(f"{option}: '{name}' cannot be used: {error}.") from error

    def write(self, name, kind, write):
        """Let write(path) write a file of a kind (as of `kind_of`), and return its name, models/<key>/<name>.safetensors.

        An older file of the same kind is replaced in one operation, and stays if writing fails. No other file is replaced.
        Raises ValueError, with a sentence, if the file cannot be written.
        """
        place = self._place(name, kind)
        path = os.path.join(self._folder(), *place.parts)
        half = f"{path}.{uuid.uuid4().hex}.part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(half)
            with _replacing:
                self._place(name, kind)  # another file may have appeared there meanwhile
                os.replace(half, path)
        except OSError as error:
            raise ValueError(f"name: '{_shown(name)}' cannot be written to models/{self.key} ({reason(error)}).") from error
        finally:
            with contextlib.suppress(OSError):
                os.remove(half)
        return f"models/{self.key}/{place}"

    def beside(self, name):
        """Return the path in this folder for a file that is not one of the listed files."""
        return os.path.join(self._folder(), name)

    def wrong_name(self, name, kind):
        """Return the error message for a name under which no file of a kind can be written, else None.

        name: None if it comes over a link and is not known yet.
        """
        try:
            name is None or self._place(name, kind)
        except ValueError as error:
            return str(error)

    def missing(self, **names):
        """Return the error message for the first input whose file does not exist, else None. names: {input: name of a file}."""
        known = self.names()
        for option, name in names.items():
            if name is not None and name not in known:
                return f"{option}: there is no file '{name}' in models/{self.key}; there are: {', '.join(known) or 'none'}."

    def _place(self, name, kind):
        """Return the PurePosixPath, relative to the folder, at which a file of this name is written.

        Raises ValueError, with a sentence, if the name is not valid or is taken.
        """
        if fault := _fault(name):
            raise ValueError(
                f"name: '{_shown(name)}' is not a valid name for a file in models/{self.key}: {fault}; write one such as "
                "sd15_20_steps."
            )
        place = pathlib.PurePosixPath("/".join(_parts(name)) + SUFFIX)
        if taken := self._taken(place, kind):
            raise ValueError(f"name: '{_shown(name)}' is taken: {taken}; choose another name.")
        return place

    def _taken(self, place, kind):
        """Return, in words, what prevents writing a file of a kind at a place, else None."""
        own = self._folder()
        for parent in list(place.parents)[:-1]:
            if os.path.lexists(os.path.join(own, parent)) and not os.path.isdir(os.path.join(own, parent)):
                return f"models/{self.key}/{parent} is not a folder"
        if fault := _irreplaceable(os.path.join(own, place), kind):
            return f"models/{self.key}/{place} is {fault} and is not replaced"
        for folder in folder_paths.get_folder_paths(self.key):
            if os.path.realpath(folder) != own and os.path.lexists(os.path.join(folder, place)):
                return f"{_called(folder)}/{place} exists, and of two files with the same name ComfyUI finds only one"
        return None

    def _folder(self):
        """Return the folder whose name is the key, else the first of the host's folders for this key."""
        folders = folder_paths.get_folder_paths(self.key)
        return os.path.realpath(next((folder for folder in folders if os.path.basename(folder) == self.key), folders[0]))


def _irreplaceable(path, kind):
    """Return, in words, what is at a path if a file of a kind must not replace it, else None."""
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
    """Return the name of a folder for messages, without its location on this machine."""
    folder, models = (pathlib.PurePath(os.path.abspath(path)) for path in (folder, folder_paths.models_dir))
    return f"models/{folder.relative_to(models).as_posix()}" if folder.is_relative_to(models) else folder.name
