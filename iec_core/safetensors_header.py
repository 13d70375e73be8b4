"""The header of a .safetensors file, which is read first, whatever the file; and what is wrong with one, in words."""

import json
import os

LARGEST_HEADER = 16 * 2**20  # bytes; that of a network of ten thousand layers has half as many


def reason(error):
    """Return what an OSError says, without the path that it names: a client on another machine has no use for it."""
    return error.strerror or str(error)


def short(value):
    """Return an error's words, or a value from a file as it can be shown."""
    text = str(value) if isinstance(value, Exception) and str(value).isprintable() else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def parsed(text, what):
    """Return what a JSON text says. what: the text's name. Raises ValueError, also where a name in it is there twice."""

    def unique(pairs):
        named = dict(pairs)
        if len(named) != len(pairs):
            raise ValueError("a name is there twice")
        return named

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {what} is damaged ({short(error)})") from error


def read_header(file):
    """Return (metadata {str: str}, {name of a tensor: its entry, as it is}, where the data begin, in bytes) of a file, which is
    opened as bytes and at its beginning. Raises OSError, or ValueError, with a sentence, where it has no such header.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(
            f"it is no .safetensors file, or a damaged one (of its {size} bytes {length} are said to be the header, which can "
            f"have {LARGEST_HEADER} at most)"
        )
    text = file.read(length)
    try:
        text = text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no .safetensors file, or its header is damaged ({error})") from error
    header = parsed(text, "header")
    if not isinstance(header, dict) or not text.startswith("{"):
        raise ValueError("it is no .safetensors file, or its header is damaged (it is no table)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is damaged (the metadata are no table of texts)")
    return metadata, header, 8 + length
