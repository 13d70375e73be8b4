"""The nodes: what a user wires. Thin V3 nodes, a file a capability; what touches the host's internals is in `host`."""

from comfy_api.latest import ComfyExtension

from . import (
    builtin,
    cachequant,
    compare,
    contraction,
    correct,
    deepcache,
    pictures,
    quantization_profile,
    quantization_report,
    quantize,
    report,
)
from .host.step_plan import serve_step_plans


class IECExtension(ComfyExtension):
    """Every node of the pack."""

    async def get_node_list(self):
        quantization = quantize, quantization_profile, quantization_report
        modules = correct, *quantization, deepcache, cachequant, builtin, compare, pictures, report, contraction
        return [node for module in modules for node in module.NODES]


async def comfy_entrypoint():
    serve_step_plans()
    return IECExtension()
