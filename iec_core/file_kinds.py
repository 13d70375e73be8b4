"""Which kind of file of this pack a .safetensors file is: its header's metadata tell."""

from .safetensors_header import read_header

QUANTIZED_MODEL = "quantized model"
QUANTIZED_KEY = "iec.quantized"  # in the metadata of a quantized model: what only we need to know
PREFIX = "iec_"


def format_of(kind):
    """Return what the metadata of a profile of a kind, such as "cache profile", have as their format."""
    return PREFIX + kind.replace(" ", "_")


def read_metadata(path):
    """Return the metadata {str: str} of a .safetensors file. Raises OSError, or ValueError where it is none."""
    with open(path, "rb") as file:
        return read_header(file)[0]


def kind_of(path):
    """Return the kind of file that this pack has written, such as "cache profile"; None for any other file."""
    try:
        metadata = read_metadata(path)
    except (OSError, ValueError):
        return None
    if QUANTIZED_KEY in metadata:
        return QUANTIZED_MODEL
    name = metadata.get("format", "")
    return name.removeprefix(PREFIX).replace("_", " ") if name.startswith(PREFIX) else None
