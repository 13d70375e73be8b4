"""Backends of a layer, timed on a GPU. Run with `make test-gpu`."""

import json

import pytest
import torch

from iec_core.quantization.kernel_times import CudaClock, KernelTimes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")


def product(size):
    x = torch.randn(size, size, device="cuda", dtype=torch.float16)
    return lambda: x @ x


def test_more_work_takes_longer():
    device = torch.device("cuda", torch.cuda.current_device())
    found = CudaClock().times({"small": product(512), "large": product(8192)}, device)
    assert 0 < found["small"] * 10 < found["large"] < 1e6


def test_times_are_kept_for_the_card(tmp_path):
    device, path = torch.device("cuda", torch.cuda.current_device()), tmp_path / "kernel_times.json"
    ways = {"small": product(256), "large": product(4096)}
    first = KernelTimes(lambda: str(path)).of(device, "product", 1, ways)
    assert KernelTimes(lambda: str(path)).of(device, "product", 1, {name: pytest.fail for name in ways}) == first
    (card,) = json.loads(path.read_text())["microseconds"]
    assert torch.cuda.get_device_name() in card


def test_during_graph_capture_only_known_times_are_used(tmp_path):
    device, times = torch.device("cuda", torch.cuda.current_device()), KernelTimes(lambda: str(tmp_path / "kernel_times.json"))
    known = times.of(device, "product", 1, {"small": product(256)})
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
    with torch.cuda.graph(graph):
        y = x + 1
        assert times.of(device, "product", 1, {"small": pytest.fail}) == known
        assert times.of(device, "product", 2, {"small": pytest.fail}) == {}
    graph.replay()
    assert y.sum().item() == 8
