"""Read the header of a .safetensors file, and say in words what is wrong with it."""

import json
import os
from typing import Any, BinaryIO

from .errors import FileError

LARGEST_HEADER = 16 * 2**20  # bytes; twice the header of a network with ten thousand layers


def reason(error: OSError) -> str:
    """Return the message of an OSError without the path, which is of no use to a client on another machine."""
    return error.strerror or str(error)


def short(value: object) -> str:
    """Return an exception's message, or the repr of a value from a file, cut to 200 characters so that it can be shown."""
    text = str(value) if isinstance(value, Exception) and str(value).isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def parsed(text: str, what: str) -> Any:
    """Return the value of a JSON text; what: the name of the text in the error message.

    Raises FileError where the text is not JSON or an object in it has the same name twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        named = dict(pairs)
        if len(named) != len(pairs):
            raise FileError("a name occurs twice")
        return named

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"its {what} is damaged ({short(error)})") from error


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, object], int]:
    """Return (metadata, {name of a tensor: its entry in the header, unchecked}, offset of the data in bytes).

    file: at its beginning. Raises OSError where it cannot be read, and FileError where it has no valid header.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    limit = min(size - 8, LARGEST_HEADER)
    if not 2 <= length <= limit:
        possible = f"can have 2 to {limit}" if limit >= 2 else "a file of this size has no header"
        raise FileError(
            f"it is not a .safetensors file, or it is damaged (its header would have {length} of its {size} bytes, but "
            f"{possible})"
        )
    try:
        text = file.read(length).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"it is not a .safetensors file, or its header is damaged ({error})") from error
    header = parsed(text, "header")
    if not isinstance(header, dict) or not text.startswith("{"):
        raise FileError("it is not a .safetensors file, or its header is damaged (it is not a table)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError("its header is damaged (the metadata are not a table of texts)")
    return metadata, header, 8 + length
