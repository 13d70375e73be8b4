"""Detection of other copies of the pack in this ComfyUI, such as an older copy that was left in custom_nodes."""

import os
import sys

import nodes as host_nodes


def _root(module):
    """Return the name of a copy's package; the host names the package after its folder."""
    return module.split(".")[0]


def _folder(root):
    return os.path.dirname(os.path.abspath(sys.modules[root].__file__))


def first_copy():
    """Return (folder of the copy that the host loaded first, folder of this copy); None if this copy is the first."""
    node = host_nodes.NODE_CLASS_MAPPINGS.get("IECKSampler")
    roots = [_root(module) for module in (getattr(node, "__module__", ""), __name__)]
    if roots[0] == roots[1] or roots[0] not in sys.modules:
        return None
    return tuple(map(_folder, roots))
