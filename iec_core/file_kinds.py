"""Which kind of file of this pack a .safetensors file is: its header's metadata tell."""

import json

from .quantized_file import FORMAT_KEY, LARGEST_HEADER

QUANTIZED_MODEL = "quantized model"
PREFIX = "iec_"


def format_of(kind):
    """Return what the metadata of a profile of a kind, such as "cache profile", have as their format."""
    return PREFIX + kind.replace(" ", "_")


def reason(error):
    """Return what an OSError says, without the path that it names: a client on another machine has no use for it."""
    return error.strerror or str(error)


def read_metadata(path):
    """Return the metadata {str: str} of a .safetensors file. Raises OSError, or ValueError where it is none."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= LARGEST_HEADER else b""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is damaged")
    return metadata


def kind_of(path):
    """Return the kind of file that this pack has written, such as "cache profile"; None for any other file."""
    try:
        metadata = read_metadata(path)
    except (OSError, ValueError):
        return None
    if FORMAT_KEY in metadata:
        return QUANTIZED_MODEL
    name = metadata.get("format", "")
    return name.removeprefix(PREFIX).replace("_", " ") if name.startswith(PREFIX) else None
