"""What a device can do, found out by trying it."""

import functools
from collections.abc import Callable

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error only says that memory is short. Such an error shows nothing about what the device can do."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words


def once_a_device(probe: Callable[[torch.device], bool | torch.Tensor]) -> Callable[[torch.device | str], bool]:
    """Decorate probe(device), which tells whether a device can do something, so that each device is probed once.

    A probe that raises an error counts as False. An error that says that memory is short is raised to the caller instead, and
    the next call probes again.
    """
    known: dict[torch.device | str, bool] = {}  # a dict, because the compiler traces into a function under functools.cache

    @functools.wraps(probe)
    def ask(device: torch.device | str) -> bool:
        if device in known:  # the fast path: each layer asks in each evaluation
            return known[device]
        device = _with_index(device)
        if device not in known:
            known[device] = _tried(probe, device)
        return known[device]

    return torch.compiler.assume_constant_result(ask)


def _with_index(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _tried(probe: Callable[[torch.device], bool | torch.Tensor], device: torch.device) -> bool:
    try:
        return bool(probe(device))
    except Exception as error:  # any class: compilers and drivers raise their own
        if is_out_of_memory(error):
            raise
        return False


def has_float64(device: torch.device) -> bool:
    """Tell whether a device is known to compute in float64. CPU and CUDA devices can; MPS and some others cannot."""
    return device.type in ("cpu", "cuda")


@once_a_device
def has_float8(device: torch.device) -> bool:
    """Tell whether a device can hold float8 e4m3."""
    return torch.ones(1, device=device).to(torch.float8_e4m3fn).float().item() == 1
