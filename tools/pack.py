"""Import the pack's host-free core outside a ComfyUI, and find the modules of a pack that a ComfyUI has loaded.

The repository root must never be on sys.path, because the pack's folder `nodes` would hide the host's module of that name. So
`iec_core` is registered under its own name, and its modules can then be imported as usual.
"""

import importlib
import importlib.util
import sys

from comfyui import ROOT


def load(name):
    """Import and return a module of the core, such as "iec_core.correction.correction_steps"."""
    if "iec_core" not in sys.modules:
        spec = importlib.util.spec_from_file_location("iec_core", ROOT / "iec_core" / "__init__.py")
        sys.modules["iec_core"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["iec_core"])
    return importlib.import_module(name)


def pack_module(name):
    """Return the pack's module with a dotted name, such as "nodes.host.sampling.rehearsal", as the host has loaded it.

    The host loads the pack under a name of its own choice.
    """
    return next(module for loaded, module in sys.modules.items() if loaded.endswith(f".{name}"))
