"""The kinds of .safetensors files that this pack writes, recognized by the metadata in the file's header."""

import os

from .safetensors_header import read_header

QUANTIZED_MODEL = "quantized model"
QUANTIZED_KEY = "iec.quantized"  # the metadata key of a quantized model's description, which only this pack reads
PREFIX = "iec_"


def format_of(kind: str) -> str:
    """Return the "format" entry in the metadata of a profile; kind: such as "cache profile"."""
    return PREFIX + kind.replace(" ", "_")


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the metadata of a .safetensors file.

    Raises OSError where it cannot be read, and FileError where it is not a .safetensors file or its header is damaged.
    """
    with open(path, "rb") as file:
        return read_header(file)[0]


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind of a file that this pack has written, such as "cache profile"; None for any other file."""
    try:
        metadata = read_metadata(path)
    except (OSError, ValueError):
        return None
    if QUANTIZED_KEY in metadata:
        return QUANTIZED_MODEL
    name = metadata.get("format", "")
    return name.removeprefix(PREFIX).replace("_", " ") if name.startswith(PREFIX) else None
