"""The ComfyUI that the pack needs. To import this from an older one fails, with a sentence that the host's log shows."""

import re

try:
    from comfyui_version import __version__ as found
except ImportError:  # of before December 2024
    found = "0.0.0, or so old that it does not tell"

OLDEST = "0.3.75"  # as in pyproject.toml, which ComfyUI's registry reads


def _numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


if _numbers(found) < _numbers(OLDEST):
    raise ImportError(f"ComfyUI-IEC needs ComfyUI {OLDEST} or newer, and this one is {found}; update ComfyUI.")
