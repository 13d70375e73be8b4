"""Quantized layers on a GPU as the host uses them. Run with `make test-gpu`.

Tested are the chosen backend, the place of the weights, graphs and compilers.
"""

import gc

import comfyui
import layer_overhead
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")

KINDS = ("Linear", "Conv2d")


@pytest.fixture(scope="module")
def layers():
    comfyui.load_nodes(cpu=not torch.cuda.is_available())
    return layer_overhead.modules()[0]


@pytest.fixture(autouse=True)
def times(layers, monkeypatch, tmp_path):
    """Return times that only this test uses."""
    monkeypatch.setattr(layers, "TIMES", type(layers.TIMES)(lambda: str(tmp_path / "kernel_times.json")))


def make(kind, compute="fastest", weight="int8"):
    """Return the same quantized layer each time, in float16 on the GPU."""
    torch.manual_seed(0)
    return layer_overhead.pair(kind, weight, compute=compute)[1].cuda()


def inputs(kind, rows=64):
    shape = (1, rows, layer_overhead.SIZE) if kind == "Linear" else (1, layer_overhead.SIZE, rows // 8, 8)
    return torch.randn(shape, device="cuda", dtype=torch.float16, generator=torch.Generator("cuda").manual_seed(1))


def close(one, other, share=2e-2):
    torch.testing.assert_close(one, other, rtol=0, atol=share * other.abs().max().item())


@pytest.mark.parametrize("weight", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_fastest_backend_is_one_of_two(layers, kind, weight):
    x = inputs(kind)
    ways = [make(kind, compute, weight)(x) for compute in ("8-bit", "dequantized")]
    layer = make(kind, weight=weight)
    assert any(torch.equal(layer(x), way) for way in ways)
    close(*ways, share=8e-2 if weight == "fp8" else 3e-2)
    choice = layer.choice(x.device, x)
    timed = layers.TIMES.known(x.device, layer._kind(x), 64, (layers.FULL, layers.WEIGHT_ONLY))
    assert bool(timed) == choice.why.startswith("microseconds: ") and all(0 < one < 1e6 for one in timed.values())


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_captured_graph_uses_earlier_timings(kind):
    layer, x = make(kind), inputs(kind)
    expected = layer(x).clone()
    graph, fresh = torch.cuda.CUDAGraph(), make(kind)
    fresh(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = fresh(x)
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_an_offloaded_layer_is_the_same(kind):
    x = inputs(kind)
    for compute in ("8-bit", "dequantized"):
        layer = make(kind, compute)
        expected = layer(x)
        layer.cpu()
        layer.comfy_cast_weights = True
        assert torch.equal(layer(x), expected) and layer.weight.device.type == "cpu"


@torch.inference_mode()
def test_a_layer_that_leaves_the_gpu_frees_all_its_memory():
    x = inputs("Linear")
    layer = make("Linear")
    layer(x)  # initialisation on first use
    layer.cpu()
    gc.collect()
    before = torch.cuda.memory_allocated()
    layer.cuda()(x)
    layer.cpu()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["8-bit", "dequantized"])
@torch.inference_mode()
def test_compiled_is_the_same(kind, compute):
    torch._dynamo.reset()
    x = inputs(kind)
    close(torch.compile(make(kind, compute), fullgraph=True)(x), make(kind, compute)(x))
