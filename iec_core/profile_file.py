"""Small .safetensors files of what a calibration has found out."""

import os

import safetensors
import safetensors.torch

from .file_kinds import format_of, read_metadata
from .safetensors_header import reason


class Profile:
    """What can be saved and loaded.

    A subclass has KIND, such as "cache profile"; VERSION, of its files; content(), ({name: tensor}, {str: str}) to be written;
    the class method _of(tensors, about), which makes a profile of these; and _is_whole(), which tells whether everything is
    there and of the shapes that belong together. On wrong content these two may raise errors, as of a key that is not there.
    """

    def save(self, path):
        """Write a .safetensors file. Raises OSError where it cannot be written."""
        tensors, about = self.content()
        about = {"format": format_of(self.KIND), "version": self.VERSION, **about}
        data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, about)
        with open(path, "wb") as file:  # the library's own writer raises no OSError
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path):
        """Read a file that `save` wrote. Raises ValueError, with a sentence, for any other. Nothing of it stays mapped: Windows
        replaces no file that is.
        """
        about = cls._readable(read_metadata, path)
        if about.get("format") != format_of(cls.KIND) or about.get("version") != cls.VERSION:
            raise ValueError(f"it is no {cls.KIND}, or one of another version; calibrate anew")
        return cls.of(cls._readable(_tensors, path), about)

    @classmethod
    def of(cls, tensors, about):
        """Return the profile of what `content` gave. Raises ValueError, with a sentence, where it is none."""
        try:
            profile = cls._of(tensors, about)
            is_whole = profile._is_whole()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            is_whole = False
        if not is_whole:
            raise ValueError(f"its content is not that of a {cls.KIND}; calibrate anew")
        return profile

    @staticmethod
    def _readable(read, path):
        try:
            return read(path)
        except OSError as error:
            why = reason(error)
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            why = str(error)
        raise ValueError(f"it cannot be read ({why}); calibrate anew")


def _tensors(path):
    with open(path, "rb") as file:
        return safetensors.torch.load(file.read())
