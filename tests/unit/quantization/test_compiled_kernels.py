"""The Triton kernels compiled for GPUs that need not be present: the instructions that a warp must issue."""

import pytest
import sass
from sass import CAPABILITIES, CONV_TYPES, convolution

from iec_core.quantization.kernels import activations, launch, products, tiles

pytestmark = pytest.mark.skipif(bool(sass.missing()), reason=f"needs Triton's compiler: {sass.missing()}")
SLOW = ("CALL", "MUFU", "LDL", "STL")  # calls, divisions and roots, spilled registers
LAYERS = {  # channels, size of the window, and number of tiles that are tried
    "3x3, 320": (320, 3, 5),
    "3x3, 1280": (1280, 3, 5),
    "1x1, 5120": (5120, 1, 2),
}


@pytest.fixture
def unread(monkeypatch):
    """Skip the disassembly, which takes half a second per kernel, for a test that reads no instruction."""
    output = sass._output
    monkeypatch.setattr(sass, "_output", lambda tool, *arguments: "" if tool == "nvdisasm" else output(tool, *arguments))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("channels", "window", "tried"), LAYERS.values(), ids=LAYERS)
def test_a_product_keeps_the_tensor_cores_busy(capability, channels, window, tried, tmp_path):
    """In every tile, the loop has no spill, no division and no call, and at least a fifth of it are products."""
    for tile in tiles.tiles(capability, channels)[:tried]:
        found = convolution(capability, channels, window, tile, tmp_path)
        assert found.stack == 0, tile
        assert not {name: count for name, count in found.loop.names.items() if name in SLOW}, tile
        assert found.loop.share >= 0.2, (tile, found.loop.share, found.loop.names)
        assert found.shared <= tiles.architecture(capability).shared, tile
        assert found.loop.names["LDGSTS"] or tile.stages == 1, tile  # copied to shared memory during the products


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_split_reduction_loop_keeps_the_tensor_cores_busy(capability, tmp_path):
    tile = tiles.tiles(capability, 1280)[0]
    found = convolution(capability, 1280, 3, tile, tmp_path, sums=True)
    assert found.stack == 0 and found.loop.share >= 0.2 and not set(SLOW).intersection(found.loop.names)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels", [4, 100])
def test_channels_that_do_not_fill_a_block_cause_no_spills(capability, channels, tmp_path, unread):
    for tile in tiles.tiles(capability, channels):
        found = convolution(capability, channels, 3, tile, tmp_path, CHANNELS_LAST=channels == 100)
        assert found.stack == 0 and found.shared <= tiles.architecture(capability).shared, tile


ALIGNED = ("pixels", "all_pixels", "channels", "item_stride", "pixel_stride", "channel_stride", "size")
MAXIMUM = {"LARGEST": launch.jitted(activations.largest, False)} if not sass.missing() else {}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_activations_are_read_and_written_in_wide_accesses(capability, channels_last, given, tmp_path):
    """16 bytes are read at once, whichever dimension comes last; each value is read and written once."""
    block_p, block_c = launch.quantize_blocks(640, channels_last)
    absent, present = ("largest_ptr", "given_ptr")[:: 1 if given else -1]
    constants = {absent: None, "channel_stride" if channels_last else "pixel_stride": 1}
    constants |= {"BLOCK_P": block_p, "BLOCK_C": block_c, **MAXIMUM}
    types = {"x_ptr": "*fp16", present: "*fp32" if given else "*i32", "scale_ptr": "*fp32", "out_ptr": "*i8"}
    kernel = launch.jitted(activations.quantize_kernel, False)
    found = sass.compiled(kernel, types, constants, capability, tmp_path, aligned=ALIGNED)
    threads = 4 * 32
    assert found.stack == 0
    assert found.count("LDG.E.128") == 2 * launch.QUANTIZE_BLOCK // threads // 16 and not found.count("LDG.E.U")
    assert found.count("STG.E.128") == launch.QUANTIZE_BLOCK // threads // 16 and not found.count("STG.E.U8")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_largest_magnitude_is_read_in_wide_accesses(capability, tmp_path):
    constants = {"BLOCK": launch.LARGEST_BLOCK, **MAXIMUM}
    types, kernel = {"x_ptr": "*fp16", "largest_ptr": "*i32"}, launch.jitted(activations.largest_kernel, False)
    found = sass.compiled(kernel, types, constants, capability, tmp_path, aligned=ALIGNED)
    assert found.stack == 0 and found.count("LDG.E.128") == 2 * launch.LARGEST_BLOCK // 128 // 16
    assert found.count("LDG") == found.count("LDG.E.128")


ONE = {"rows": 1, "pixels": 1, "out_channels": 1}  # an integer that is 1 is a constant of the kernel


def test_kernels_compile_with_arguments_equal_to_one(tmp_path, unread):
    """A Linear layer with a single row passes arguments that are 1, and several programs share its reduction loop."""
    tile = tiles.tiles(90, 1280)[-1]
    assert convolution(90, 1280, 1, tile, tmp_path, sums=True, **ONE).stack == 0
    assert convolution(90, 1280, 1, tile, tmp_path, **ONE).stack == 0
    constants = {"CHANNELS_LAST": False, "SPLITS": 5, "BLOCK_M": 32, "BLOCK_N": 64, **ONE}
    types = {name: kind for name, kind in CONV_TYPES.items() if name not in ("x_ptr", "weight_ptr")} | {"sums_ptr": "*i32"}
    assert sass.compiled(launch.jitted(products.add_up_kernel, False), types, constants, 90, tmp_path).stack == 0
    block_p, block_c = launch.quantize_blocks(1, True)
    ones = {name: 1 for name in ALIGNED if name != "size"}
    constants = {"given_ptr": None, "BLOCK_P": block_p, "BLOCK_C": block_c, **MAXIMUM, **ones}
    types = {"x_ptr": "*fp16", "largest_ptr": "*i32", "scale_ptr": "*fp32", "out_ptr": "*i8"}
    assert sass.compiled(launch.jitted(activations.quantize_kernel, False), types, constants, 90, tmp_path).stack == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_adding_up_causes_no_spills(capability, tmp_path):
    block_m, block_n = launch.ADD_UP_BLOCK
    constants = {"CHANNELS_LAST": False, "SPLITS": 6, "BLOCK_M": block_m, "BLOCK_N": block_n}
    types = {name: kind for name, kind in CONV_TYPES.items() if name not in ("x_ptr", "weight_ptr")} | {"sums_ptr": "*i32"}
    kernel = launch.jitted(products.add_up_kernel, False)
    found = sass.compiled(kernel, types, constants, capability, tmp_path, aligned=("rows", "pixels", "out_channels"))
    assert found.stack == 0 and found.count("LDG.E.128") and found.count("STG.E.128")


def test_machine_code_is_parsed():
    """The text has a loop whose exit is written as a call, as ptxas does, and which also contains a call."""
    text = """
.L_x_2:
        /*0000*/                   IMMA.16832.S8.S8 R8, R140.ROW, R10.COL, R148 ;
        /*0010*/              @!P0 CALL.REL.NOINC `(.L_x_0) ;
        /*0020*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P1 CALL.REL.NOINC `(.L_x_5) ;
        /*0040*/             @UP0  IADD3 R0, R0, 0x1, RZ ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_0:
        /*0060*/                   EXIT ;
.L_x_5:
        /*0070*/                   MUFU.RCP R1, R2 ;
    """
    code, labels = sass._read(text)
    found = sass.Compiled(1, 0, 0, code, labels)
    assert len(code) == 8 and found.count("IADD3") == 1 and found.loop.names["CALL"] == 1
    assert found.loop.products == 1 + 128 // 8 and found.loop.share == 17 / (17 + 3)
