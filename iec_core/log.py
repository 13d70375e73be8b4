"""The pack's logger. Its messages name the pack, since ComfyUI prints the messages of all packs without a logger's name."""

import logging
from collections.abc import MutableMapping
from typing import Any


class _NamedMessages(logging.LoggerAdapter):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return f"[ComfyUI-IEC] {msg}", kwargs


logger = _NamedMessages(logging.getLogger("comfyui-iec"), {})
