"""Check the MODEL that a search is to start from."""

from ..caching.cache_run import KEY, other_cache
from ..quantization.quantize import quantization_of
from ..sampling.network_calls import IEC


def check_model(model):
    """Raise ValueError if a MODEL is quantized, cached or corrected already, because the search would measure that twice."""
    wrapped = {key for wrappers in model.wrappers.values() for key in wrappers}
    found = "quantized" if quantization_of(model) else None
    found = found or ("cached" if KEY in wrapped or other_cache(model.model_options) else None)
    found = found or ("corrected by IEC" if IEC in wrapped else None)
    if found:
        raise ValueError(f"model: this MODEL is {found} already; connect the model from before the node that did it.")
