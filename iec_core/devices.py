"""What a device can do, found out by trying it."""

import functools

import torch


def is_out_of_memory(error):
    """Tell whether an error says that memory is short, and nothing of what the device can do."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def once_a_device(probe):
    """Decorate probe(device), which tells whether a device can do something: each device is tried once, and what ends in an
    error it cannot do. Where memory is short that is raised, and the next call tries again.
    """
    known = {}  # a dict, for the compiler sees through functools.cache

    @functools.wraps(probe)
    def ask(device):
        if device in known:  # a tensor's device; each layer asks in each evaluation
            return known[device]
        device = _with_index(device)
        if device not in known:
            known[device] = _tried(probe, device)
        return known[device]

    return torch.compiler.assume_constant_result(ask)


def _with_index(device):
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _tried(probe, device):
    try:
        return bool(probe(device))
    except Exception as error:  # of any kind: compilers and drivers have their own
        if is_out_of_memory(error):
            raise
        return False


def has_float64(device):
    """Tell whether a torch.device is known to compute in float64; MPS and some others do not."""
    return device.type in ("cpu", "cuda")


@once_a_device
def has_float8(device):
    """Tell whether a device can hold float8 e4m3."""
    return torch.ones(1, device=device).to(torch.float8_e4m3fn).float().item() == 1
