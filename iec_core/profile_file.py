"""Small .safetensors files with the results of a calibration."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch

from .errors import FileError
from .file_kinds import format_of, read_metadata
from .safetensors_header import reason

OwnProfile = TypeVar("OwnProfile", bound="Profile")
Content = TypeVar("Content")


class Profile(ABC):
    """Base class of the calibration results that can be saved and loaded.

    A subclass sets KIND, such as "cache profile", and VERSION, that of its files.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[str]

    @abstractmethod
    def content(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors and the metadata to be written."""

    @classmethod
    @abstractmethod
    def _of(cls: type[OwnProfile], tensors: dict[str, torch.Tensor], about: dict[str, str]) -> OwnProfile:
        """Return the profile with the content of a file. On wrong content it may raise any error that `of` catches."""

    @abstractmethod
    def _is_whole(self) -> bool:
        """Tell whether every part is there, in shapes that fit together. On wrong content it may raise the same errors as
        `_of`.
        """

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file. Raises OSError where it cannot be written."""
        tensors, about = self.content()
        about = {"format": format_of(self.KIND), "version": self.VERSION, **about}
        data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, about)
        with open(path, "wb") as file:  # the library's own writer does not raise OSError
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls: type[OwnProfile], path: str | os.PathLike[str]) -> OwnProfile:
        """Read a file that `save` wrote. Raises FileError for any other.

        No part of the file stays memory-mapped, because Windows cannot replace a mapped file.
        """
        about = cls._readable(read_metadata, path)
        if about.get("format") != format_of(cls.KIND) or about.get("version") != cls.VERSION:
            raise FileError(f"it is not a {cls.KIND}, or is one of another version; calibrate again")
        return cls.of(cls._readable(_tensors, path), about)

    @classmethod
    def of(cls: type[OwnProfile], tensors: dict[str, torch.Tensor], about: dict[str, str]) -> OwnProfile:
        """Return the profile whose `content` is given. Raises FileError where the content is incomplete or does not fit."""
        try:
            profile = cls._of(tensors, about)
            is_whole = profile._is_whole()
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError):
            is_whole = False
        if not is_whole:
            raise FileError(f"its content is not that of a {cls.KIND}; calibrate again")
        return profile

    @staticmethod
    def _readable(read: Callable[[str | os.PathLike[str]], Content], path: str | os.PathLike[str]) -> Content:
        try:
            return read(path)
        except OSError as error:
            why = reason(error)
        except (ValueError, KeyError, safetensors.SafetensorError) as error:
            why = str(error)
        raise FileError(f"it cannot be read ({why}); calibrate again")


def _tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        return safetensors.torch.load(file.read())
