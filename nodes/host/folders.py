"""Files of ours in the host's model folders."""

import os
import uuid

import folder_paths

SUFFIX = ".safetensors"
FORBIDDEN = set('<>:"|?*')  # in names on Windows, where a colon leads to another drive


def _is_plain(part):
    """Tell whether a part of a path is a plain name on every system."""
    whole = part and part.isprintable() and len(part) <= 200 and not FORBIDDEN & set(part)
    return whole and not part.startswith(".") and not part.endswith((".", " "))


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
        """Return when the file of this name was last written."""
        return os.path.getmtime(self.path(name))

    def read(self, option, name, read):
        """Return read(path) of the file of this name, which comes from the input `option`. Raises ValueError, with a sentence,
        where there is none, or none that can be read.
        """
        try:
            return read(self.path(name))
        except ValueError as error:
            raise ValueError(f"{option}: '{name}' is of no use: {error}.") from error

    def path_to_write(self, name):
        """Return where a file of this name is to be written. Raises ValueError where that would not be one in the folder."""
        plain = name.removesuffix(SUFFIX)
        parts = plain.replace("\\", "/").split("/")
        if not all(_is_plain(part) for part in parts):
            raise ValueError(f"name: '{name}' is no name for a file in models/{self.key}; write one such as sd15_20_steps.")
        return os.path.join(self._folder(), *parts) + SUFFIX

    def write(self, name, write):
        """Let write(path) write a file, and return its path. An older one is replaced at once, and stays if that fails. Raises
        ValueError, with a sentence, where it cannot be written.
        """
        path = self.path_to_write(name)
        half = f"{path}.{uuid.uuid4().hex}.part"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write(half)
            os.replace(half, path)
        except OSError as error:
            raise ValueError(f"name: '{name}' cannot be written to models/{self.key} ({error}).") from error
        finally:
            if os.path.exists(half):
                os.remove(half)
        return path

    def wrong_name(self, name):
        """Return the sentence for a name under which no file can be written, else None. None comes over a link."""
        try:
            name is None or self.path_to_write(name)
        except ValueError as error:
            return str(error)

    def missing(self, **names):
        """Return the sentence for the first input of names={input: name of a file} that there is none of, else None."""
        known = self.names()
        for option, name in names.items():
            if name is not None and name not in known:
                return f"{option}: there is no file '{name}' in models/{self.key}; there are: {', '.join(known) or 'none'}."

    def _folder(self):
        """Return the folder of the host's several that has the key's own name."""
        folders = folder_paths.get_folder_paths(self.key)
        return os.path.realpath(next((folder for folder in folders if os.path.basename(folder) == self.key), folders[0]))
