"""Small .safetensors files of what a calibration has found out."""

import safetensors
import safetensors.torch


def write_profile(path, kind, version, tensors, about):
    """Write {name: tensor} and about, {str: str}. kind: such as "cache profile"."""
    about = {"format": _format(kind), "version": version, **about}
    safetensors.torch.save_file({name: value.contiguous() for name, value in tensors.items()}, path, about)


def _format(kind):
    return f"iec_{kind}".replace(" ", "_")


def read_profile(path, kind, version, make):
    """Return make(about, tensors) of a file that `write_profile` wrote; make gives None for content that does not belong
    together.

    Raises ValueError, with a sentence, for any other file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"it cannot be read as a .safetensors file ({error}); calibrate anew") from error
    if about.get("format") != _format(kind) or about.get("version") != version:
        raise ValueError(f"it is no {kind}, or one of another version; calibrate anew")
    try:
        profile = make(about, tensors)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError):
        profile = None
    if profile is None:
        raise ValueError(f"its content is not that of a {kind}; calibrate anew")
    return profile
