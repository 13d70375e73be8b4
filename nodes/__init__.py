"""The nodes that a user wires: thin V3 nodes, one folder per capability. Code that needs ComfyUI's internals is in `host`."""

from .host import version  # noqa: F401 - first: it refuses a ComfyUI that lacks what the other modules import

# isort: split

from comfy_api.latest import ComfyExtension

from ..iec_core.log import logger
from .host.second_copy import first_copy

COPIES = first_copy()
WEB_DIRECTORY = "./web" if COPIES is None else None

if COPIES is None:  # a second copy adds nothing: routes, operators and the web extension can be registered only once
    from . import builtin
    from .caching import cachequant, deepcache
    from .correction import contraction, samplers
    from .host.correction.step_plan_route import serve_step_plans
    from .host.inputs import refuse_unfit_values
    from .host.server import running_server
    from .quantization import calibrate_weights, quantization_profile, quantization_report, quantize
    from .reports import compare, pictures, report
    from .search import find_settings

    QUANTIZATION = quantize, calibrate_weights, quantization_profile, quantization_report
    MODULES = samplers, *QUANTIZATION, deepcache, cachequant, builtin, compare, pictures, report, contraction, find_settings
    NODES = [node for module in MODULES for node in module.NODES]
else:
    NODES = []


class IECExtension(ComfyExtension):
    """Every node of the pack; a second copy of the pack has no nodes."""

    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    if COPIES is not None:
        first, second = COPIES
        logger.warning(f"{second} is not loaded, because {first} is a copy of the same nodes; remove one of them.")
    elif server := running_server():
        serve_step_plans(server)
        refuse_unfit_values(server, {node.define_schema().node_id: node for node in NODES})
    return IECExtension()
