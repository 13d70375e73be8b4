"""Stands in for a GPU: what a computation asks of a device can be seen on the meta device, which has no numbers."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Copies(TorchDispatchMode):
    """Counts tensors that go to another device, in `count`. Who waits for a number of a meta tensor, as for a GPU's, fails."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sources = {one.device for one in args if isinstance(one, torch.Tensor)}
        self.count += isinstance(result, torch.Tensor) and bool(sources) and result.device not in sources
        return result
