"""Check of ComfyUI's version: importing this module in a ComfyUI that is too old fails, with a message in the host's log."""

import re

try:
    from comfyui_version import __version__ as found
except ImportError:  # a ComfyUI from before December 2024
    found = "0.0.0, or too old to tell its version"

OLDEST = "0.3.75"  # as in pyproject.toml, which ComfyUI's registry reads


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(found) < _numbers(OLDEST):
    raise ImportError(f"ComfyUI-IEC needs ComfyUI {OLDEST} or newer, but this one is {found}; update ComfyUI.")
