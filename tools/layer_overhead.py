"""Measure the time that Python takes in a small layer, next to the host's own layer: on a GPU a layer takes at least this time.

    python tools/layer_overhead.py [--repeat 9] [--calls 2000]

The kernels are replaced by functions that do nothing, so that any machine can measure; the code around them is the same as on a
GPU. Prints a table for docs/quantization.md.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import timeit
from unittest import mock

import benchmark
import comfyui
import pack
import torch

SIZE, SIDE = 64, 2


def modules():
    """Return the host's loaded modules (nodes.host.quantization.quantized_layers, iec_core.quantization.int8) of the pack."""
    layers = pack.pack_module("nodes.host.quantization.quantized_layers")
    return layers, sys.modules[layers.linear_int8.__module__]


def pair(kind, weight="int8", **activation):
    """Return (layer of the host, the same layer quantized, with 8-bit activations) in float16.

    kind: "Linear" or "Conv2d". weight: the kind of a WeightFormat. activation: inputs of an ActivationFormat.
    """
    import comfy.ops

    layers, _ = modules()
    operations, like = comfy.ops.manual_cast, {"dtype": torch.float16}
    plain = (
        operations.Linear(SIZE, SIZE, **like) if kind == "Linear" else operations.Conv2d(SIZE, SIZE, 3, padding=1, **like)
    ).requires_grad_(False)
    for parameter in plain.parameters():  # the layers are created without values
        torch.nn.init.normal_(parameter)
    core = pack.pack_module("iec_core.quantization.packing")
    packing = core.Packing(plain.weight.shape, core.WeightFormat(weight))
    packed, format_ = packing.quantize(plain.weight), layers.ActivationFormat(8, **activation)
    return plain, layers.class_for(plain).of("layer", plain, packing, packed, plain.bias, format_)


@contextlib.contextmanager
def stubbed(backend):
    """Return a context in which layers use `backend`, and its kernels and the host's do nothing."""
    layers, core = modules()
    rows, image = torch.zeros(4, SIZE, dtype=torch.float16), torch.zeros(1, SIZE, SIDE, SIDE, dtype=torch.float16)
    pixels = rows[..., None, None]
    with contextlib.ExitStack() as stubs:

        def stub(owner, name, function):
            stubs.enter_context(mock.patch.object(owner, name, function))

        stub(torch.nn.functional, "linear", lambda x, *_: rows[None])
        stub(torch.nn.Conv2d, "_conv_forward", lambda *_: image)
        stub(layers, "linear_backend", lambda *_: backend)
        stub(layers, "conv_backend", lambda *_: backend)
        stub(core.launch, "quantized", lambda x, *_: (x, x))
        stub(core.launch, "conv2d", lambda x, *_: pixels if x.shape[-1] == 1 else image)
        if core.kitchen is not None:
            stub(core.comfy_kitchen, "int8_linear", lambda x, *_: rows[None])
        yield


def rows(repeat, calls):
    """Return [(what, microseconds of the host's layer, of the pack's layer, ratio)], medians of rounds in turn."""
    layers, core = modules()
    cases = {
        "Linear, comfy-kitchen": ("Linear", core.KITCHEN), "Linear, Triton": ("Linear", core.TRITON),
        "Conv2d, Triton": ("Conv2d", core.TRITON),
    }  # fmt: skip
    if core.kitchen is None:
        cases.pop("Linear, comfy-kitchen")
    found = []
    for name, (kind, backend) in cases.items():
        shape = (1, 4, SIZE) if kind == "Linear" else (1, SIZE, SIDE, SIDE)
        (plain, ours), x = pair(kind, compute=layers.EIGHT_BIT), torch.zeros(shape, dtype=torch.float16)
        with stubbed(backend):
            ours(x), plain(x)  # initialisation on first use
            rounds = [
                [timeit.timeit(functools.partial(layer, x), number=calls) for layer in (plain, ours)] for _ in range(repeat)
            ]  # fmt: skip
        host, own = (1e6 * statistics.median(column) / calls for column in zip(*rounds))
        found.append((name, host, own, statistics.median(one[1] / one[0] for one in rounds)))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--calls", type=int, default=2000)
    arguments = parser.parse_args()
    comfyui.load_nodes(cpu=True)
    print(f"\nPython around a layer. {benchmark.device()[1]}; kernels replaced by nothing\n")
    print("| layer | the host's, microseconds | W8A8 | ratio |")
    print("| --- | --- | --- | --- |")
    with torch.inference_mode():
        for name, host, own, ratio in rows(arguments.repeat, arguments.calls):
            print(f"| {name} | {host:.1f} | {own:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
