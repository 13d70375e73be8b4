"""Compile Triton kernels for GPUs that need not be present, and read their machine code, with the tools in Triton's wheel.

    python tools/sass.py

Prints how many instructions a warp must issue in the loop of an 8-bit convolution, for docs/quantization.md. This does not
replace a benchmark: it does not show how long a warp waits for memory.
"""

import collections
import contextlib
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import pack

with contextlib.suppress(ImportError):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

launch, products, tiles = (pack.load(f"iec_core.quantization.kernels.{name}") for name in ("launch", "products", "tiles"))

CAPABILITIES = (80, 89, 90, 120)  # A100, 4090, H100, 5090
CONV_TYPES = {
    "x_ptr": "*i8", "activation_scale_ptr": "*fp32", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32", "bias_ptr": "*fp16",
    "out_ptr": "*fp16",
}  # fmt: skip
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+\s+)?(.*?)\s*;")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
HOPPER = re.compile(r"IGMMA\.64x(\d+)x32")  # an instruction of four warps


def missing():
    """Return why nothing can be compiled, "" if it can."""
    if "triton" not in globals():
        return "Triton is not installed"
    absent = [name for name in ("ptxas", "cuobjdump", "nvdisasm") if not (_tools() / name).exists()]
    return f"Triton has no {absent[0]} here" if absent else ""


def _tools():
    return pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel. registers: per thread; stack: bytes that a thread spills; shared: bytes of shared memory; code: the
    instructions, a text each; labels: {name: index in code}.
    """

    registers: int
    stack: int
    shared: int
    code: list
    labels: dict

    def count(self, name):
        """Return the number of instructions whose name begins with `name`."""
        return sum(one.startswith(name) for one in self.code)

    @property
    def loop(self):
        """The Loop that contains the products: the body of the longest backward jump over matrix products."""
        jumps = [(self._target(one), place) for place, one in enumerate(self.code) if one.startswith("BRA")]
        bodies = [(start, end) for start, end in jumps if start is not None and start <= end]
        bodies = [body for body in bodies if any("MMA" in one for one in self.code[body[0] : body[1] + 1])]
        start, end = max(bodies, key=lambda body: body[1] - body[0])
        code = self.code[start : end + 1]
        # The exit of a loop may be written as a call of the next instruction.
        return Loop([one for one in code if not (one.startswith("CALL") and self._target(one) == end + 1)])

    def _target(self, instruction):
        found = TARGET.search(instruction)
        return self.labels.get(found[1]) if found else None


@dataclass(frozen=True)
class Loop:
    """A loop. code: its instructions, a text each."""

    code: list

    @property
    def names(self):
        """{name without its modifiers: number of instructions}."""
        return collections.Counter(one.split()[0].split(".")[0] for one in self.code)

    @property
    def products(self):
        """The number of products of 16 x 32 by 32 x 8 per warp."""
        hopper = sum(int(found[1]) // 8 for one in self.code if (found := HOPPER.match(one)))
        return hopper + sum("IMMA.16832" in one for one in self.code)

    @property
    def share(self):
        """The products' share of the instructions, counting each product as one instruction."""
        others = sum("MMA" not in one for one in self.code)
        return self.products / (self.products + others)


def compiled(kernel, signature, constants, capability, folder, warps=4, stages=3, aligned=()):
    """Return a Compiled for a compute capability such as 80.

    kernel: a triton.jit function; signature: {argument: type, such as "*fp16"}, default i32; constants: {argument: value};
    aligned: the integers that are divisible by 16. folder: where files may be written.
    """
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in names}
    hints = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if kinds[name][0] == "*" or name in aligned
    }
    source = ASTSource(
        fn=kernel, signature=kinds, constexprs={(names.index(name),): value for name, value in constants.items()}, attrs=hints
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )  # fmt: skip
    path = pathlib.Path(folder) / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    usage = _output("cuobjdump", "-res-usage", path)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    text = _output("nvdisasm", "-ndf", "-c", path)  # gives the same text in two thirds of the time
    return Compiled(registers, stack, made.metadata.shared, *_read(text))


def _output(tool, *arguments):
    return subprocess.run([_tools() / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read(text):
    code, labels = [], {}
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(found[1])
    return code, labels


def convolution(capability, channels, window, tile, folder, sums=False, **more):
    """Return the Compiled convolution with this many channels and a window x window kernel, in float16, in a Tile.

    sums: as it is launched when several programs share the loop over channels and window. more: other constants of the kernel.
    """
    constants = {
        "CHANNELS": channels, "KERNEL_H": window, "KERNEL_W": window, "PADDED": window > 1, "WIDE": False, "GROUP": tiles.GROUP,
        "CHANNELS_LAST": sums, "SPLITS": 5 if sums else 1, "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **more,
    }  # fmt: skip
    types = CONV_TYPES
    if sums:
        left_out = ("activation_scale_ptr", "weight_scale_ptr", "bias_ptr")
        constants |= dict.fromkeys(left_out)
        types = {name: kind for name, kind in types.items() if name not in left_out} | {"out_ptr": "*i32"}
    kernel, aligned = launch.jitted(products.conv2d_kernel, False), ("rows", "pixels", "out_channels")
    return compiled(kernel, types, constants, capability, folder, tile.warps, tile.stages, aligned)


def main():
    if reason := missing():
        raise SystemExit(f"Nothing is compiled: {reason}.")
    print("| sm | channels | tile | stages | registers | spilled, bytes | shared, KB | loop | products | their share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for capability in CAPABILITIES:
            for channels in (320, 1280):
                for tile in tiles.tiles(capability, channels)[:3:2]:
                    found = convolution(capability, channels, 3, tile, folder)
                    loop = found.loop
                    print(
                        f"| {capability} | {channels} | {tile.m} x {tile.n} x {tile.k} | {tile.stages} | {found.registers} | "
                        f"{found.stack} | {found.shared / 1024:.0f} | {len(loop.code)} | {loop.products} | {loop.share:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
