"""Replace a GPU by the meta device, which has no values, to detect copies to a device and waits for its values."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Count tensors that are copied to another device, in `count`. Code that waits for a meta tensor's value fails."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sources = {one.device for one in args if isinstance(one, torch.Tensor)}
        self.count += isinstance(result, torch.Tensor) and bool(sources) and result.device not in sources
        return result
