"""Files of quantized models: contents, refusals, and thousands of damaged files.

The contents are checked with the safetensors library and with the format's definition.
"""

import json
import math
import random
import re
import resource
import time
import tracemalloc
import weakref

import pytest
import safetensors
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iec_core import safetensors_header
from iec_core.quantization import quantized_file
from iec_core.quantization.activation_scales import ActivationScales
from iec_core.quantization.packing import Packing, WeightFormat, quantize_rows
from iec_core.quantization.quantized_file import LayerFile, QuantizedFile, description, layer_tensors, scale_tensors, write
from iec_core.quantization.two_scales import LEVELS

LAYERS = {
    "a.int8": ((6, 20), WeightFormat("int8")),
    "a.int8_search": ((6, 20), WeightFormat("int8", search=True)),
    "a.int8_rotated": ((5, 128), WeightFormat("int8", rotation=64)),
    "a.int8_groups": ((6, 96), WeightFormat("int8", 32)),
    "a.int4": ((5, 7), WeightFormat("int4")),
    "a.int4_groups_rotated": ((3, 64), WeightFormat("int4", 32, 16, True)),
    "b.0.int8_conv": ((4, 3, 3, 3), WeightFormat("int8")),
    "b.1.int4_conv": ((3, 5, 3, 1), WeightFormat("int4")),
    "b.int8_conv_groups": ((4, 32, 1, 1), WeightFormat("int8", 32)),
    "c.fp8": ((16, 32), WeightFormat("fp8")),
    "c.fp8_rotated": ((4, 256), WeightFormat("fp8", rotation=256)),
    "c.fp8_conv": ((3, 2, 2, 2), WeightFormat("fp8")),
}
CALIBRATED = {  # of version 2
    "d.int4": ((5, 7), WeightFormat("int4", calibrated=True)),
    "d.int4_branch": ((6, 20), WeightFormat("int4", calibrated=True, rank=3)),
    "d.int8_conv_branch": ((4, 3, 3, 3), WeightFormat("int8", calibrated=True, rank=2, factors="bfloat16")),
    "d.int8": ((6, 20), WeightFormat("int8", calibrated=True)),
}
ALL = LAYERS | CALIBRATED
CHANGED = {  # of version 3
    "e.int4_branch": ((6, 20), WeightFormat("int4", 4, rank=3)),
    "e.fp8_branch": ((6, 20), WeightFormat("fp8", rank=2)),
}
HOSTS_INT4 = {  # of version 4
    "f.int4": ((6, 128), WeightFormat("int4", rotation=64)),
    "f.int4_calibrated": ((5, 256), WeightFormat("int4", rotation=256, calibrated=True)),
}
TWO_SCALES = {  # of version 4
    "g.rotated": ((6, 512), WeightFormat("int4", 32, rotation=256, two_scales=True)),
    "g.small_blocks": ((6, 128), WeightFormat("int4", 32, rotation=64, two_scales=True)),  # unsupported by the host's kernels
    "g.calibrated": ((5, 256), WeightFormat("int4", 16, rotation=256, calibrated=True, two_scales=True)),
    "g.plain": ((6, 64), WeightFormat("int4", 16, two_scales=True)),
    "g.conv": ((4, 8, 2, 2), WeightFormat("int4", 16, two_scales=True)),
    "g.branch": ((6, 64), WeightFormat("int4", 16, rotation=64, calibrated=True, rank=3, two_scales=True)),
}
EVERY = ALL | CHANGED | HOSTS_INT4 | TWO_SCALES
HOSTS = {"a.int8", "a.int8_search", "a.int8_rotated", "c.fp8"}
ABOUT = {
    "name": "W8A8, rotated", "activation": {"bits": 8, "per_tensor": False}, "dtype": "bfloat16", "network": "Net",
    "settings": {},
}  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(name):
    return normal(*EVERY[name][0], seed=len(name))


def packed_of(name):
    packing = Packing(*EVERY[name])
    rank, factors = packing.format.rank, None
    if rank:
        factors = normal(packing.rows, rank), normal(rank, packing.inputs)
    return packing.packed_rows(*quantize_rows(packing.rotated(packing.matrix(weight_of(name))), packing.format), factors)


PLAIN = {
    "a.int8.bias": normal(6), "norm.weight": normal(5).bfloat16(), "norm.scale": torch.tensor(3.5).half(),
    "count": torch.tensor([[1, -2]]), "mask": torch.tensor([True, False, True]), "v_pred": torch.zeros(0),
    "x.pos_embed": normal(1, 3, 2),
}  # fmt: skip


def activation_scales(names=("a.int8", "c.fp8"), fingerprint=None):
    sigmas = torch.tensor([14.6146, 2.5, 0.0292], dtype=torch.float64)
    facts = {"quantization": ABOUT["name"], "scales": "timestep-wise", "steps": "3"}
    return ActivationScales(facts, fingerprint, names, sigmas, normal(3, len(names), seed=3).exp())


def save(path, names=tuple(LAYERS), plain=None, **about):
    """Write a file of layers of EVERY and PLAIN tensors."""
    plain, about = PLAIN if plain is None else plain, {**ABOUT, "fingerprint": normal(40, seed=9), **about}
    layers = {name: LayerFile(*EVERY[name]) for name in names}
    tensors = dict(plain)
    for name, layer in layers.items():
        tensors |= layer_tensors(name, layer, packed_of(name), about["activation"]["bits"])
    tensors |= scale_tensors(about.get("scales"))
    sources = {key: (tensor.dtype, tensor.shape, lambda tensor=tensor: tensor) for key, tensor in tensors.items()}
    write(path, sources, description(layers, **about))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Contents of a file


def hadamard(size):
    """Return the matrix by its definition: every pair of base-4 digits that sums to 3 gives a minus."""
    matrix, places = torch.ones(size, size, dtype=torch.float64), torch.arange(size)
    for digit in range(round(math.log(size, 4))):
        at = places // 4**digit % 4
        matrix = torch.where(at[:, None] + at == 3, -matrix, matrix)
    return matrix / math.sqrt(size)


def rows_of(weight, rotation):
    """Return a weight as the float64 matrix that is quantized."""
    rows = (weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1)).double().flatten(1)
    return (rows.unflatten(1, (-1, rotation)) @ hadamard(rotation)).flatten(1) if rotation else rows


def numbers_of(name, stored):
    """Return a layer's stored numbers as float64 [O, K]."""
    shape, fmt = LAYERS[name]
    if fmt.kind != "int4":
        return stored.double()
    low, high = stored.int() % 16, stored.int() // 16
    pairs = torch.stack([low, high], 2).flatten(1)[:, : math.prod(shape[1:])]
    return torch.where(pairs > 7, pairs - 16, pairs).double()


@pytest.mark.parametrize("name", LAYERS)
def test_stored_values_times_scales_are_the_weights(path, name):
    """Numbers times scales, with the rotation undone, are the weight, with the precision of its kind."""
    (shape, fmt), weight = LAYERS[name], weight_of(name)
    with safetensors.safe_open(save(path), "pt") as file:
        stored, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
    kinds = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
    inputs = math.prod(shape[1:])
    assert stored.dtype == kinds[fmt.kind] and scale.dtype == torch.float32
    assert stored.shape == (shape[0], (inputs + 1) // 2 if fmt.kind == "int4" else inputs)
    groups = inputs // fmt.group_size if fmt.group_size else 1
    assert scale.shape == (() if fmt.kind == "fp8" else (shape[0], groups))
    wide = scale.double() if fmt.kind == "fp8" else scale.double().repeat_interleave(inputs // groups, 1)
    rows = rows_of(weight, fmt.rotation)
    error = numbers_of(name, stored) * wide - rows
    if fmt.kind == "fp8":
        assert (error.abs() <= rows.abs() / 16 + wide / 512).all()
    else:  # the search also tries a share of one, so that it is not worse
        largest = rows.unflatten(1, (groups, -1)).abs().amax(2) / {"int8": 127, "int4": 7}[fmt.kind]
        bound = largest / 2 * math.sqrt(inputs // groups) * (1 + 1e-5)
        assert (error.unflatten(1, (groups, -1)).norm(dim=2) <= bound).all()
    restored = numbers_of(name, stored) * wide
    if fmt.rotation:
        restored = (restored.unflatten(1, (-1, fmt.rotation)) @ hadamard(fmt.rotation)).flatten(1)
    if len(shape) == 4:
        restored = restored.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    assert (restored - weight).norm() <= {"int8": 0.02, "int4": 0.2, "fp8": 0.05}[fmt.kind] * weight.norm()
    torch.testing.assert_close(Packing(shape, fmt).dequantize(packed_of(name)).double(), restored, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 16])
def test_layers_are_described_in_the_hosts_format(path, bits):
    expected = {
        "a.int8": {"format": "int8_tensorwise"},
        "a.int8_rotated": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
        "c.fp8": {"format": "float8_e4m3fn"},
        "c.fp8_rotated": {"format": "iec_fp8", "convrot": True, "convrot_groupsize": 256},  # the host's float8 is not rotated
        "a.int8_groups": {"format": "iec_int8"},
        "a.int4": {"format": "iec_int4"},
        "b.0.int8_conv": {"format": "iec_int8"},
        "c.fp8_conv": {"format": "iec_fp8"},
    }
    with safetensors.safe_open(save(path, activation={"bits": bits, "per_tensor": False}), "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        told = {name: bytes(file.get_tensor(f"{name}.comfy_quant").tolist()) for name in LAYERS}
    assert set(layers) == set(LAYERS)
    for name, about in expected.items():
        wanted = about | ({"full_precision_matrix_mult": True} if bits == 16 else {})
        assert json.loads(told[name]) == layers[name] == wanted
    assert {name for name in LAYERS if not layers[name]["format"].startswith("iec_")} == HOSTS


def test_only_the_hosts_formats_have_the_weights_shape(path):
    """A host that does not know the format of another layer must not be able to use it as a weight."""
    with safetensors.safe_open(save(path), "pt") as file:
        for name, (shape, fmt) in LAYERS.items():
            found = tuple(file.get_slice(f"{name}.weight").get_shape())
            assert (found == shape) == (name in HOSTS or (len(shape) == 2 and fmt.kind != "int4")), name


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_all_layers_survive_a_file(path):
    settings = {"heads": 3, "causal": True, "name": "x", "eps": 1e-6, "dims": [4, 6, 6], "none": None}
    about = {"activation": {"bits": 16, "per_tensor": True}, "dtype": "float16", "settings": settings}
    fingerprint = normal(300, seed=4)
    with QuantizedFile(save(path, fingerprint=fingerprint, **about)) as file:
        assert file.layers == {name: LayerFile(*layer) for name, layer in LAYERS.items()}
        assert file.settings == settings
        assert {name: file.about[name] for name in ("name", "dtype", "network", "activation")} == {
            "name": "W8A8, rotated", "dtype": "float16", "network": "Net", "activation": about["activation"]
        }  # fmt: skip
        assert torch.equal(torch.tensor(file.about["fingerprint"]), fingerprint)
        for name in LAYERS:
            assert torch.equal(file.packed(name), packed_of(name)), name
        assert set(file.plain) == set(PLAIN)
        for key, tensor in PLAIN.items():
            found = file.tensor(key)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape) and torch.equal(as_bytes(found), as_bytes(tensor))


def test_calibrated_layers_are_read_from_a_version_2_file(path):
    save(path, names=tuple(ALL))
    with safetensors.safe_open(path, "pt") as file:
        about, hosts = (json.loads(file.metadata()[key]) for key in ("iec.quantized", "_quantization_metadata"))
        out, into = file.get_tensor("d.int4_branch.weight_out"), file.get_tensor("d.int4_branch.weight_in")
        assert file.get_tensor("d.int8_conv_branch.weight_out").dtype == torch.bfloat16
    assert about["version"] == 2
    assert torch.equal(out, normal(6, 3).half()) and torch.equal(into, normal(3, 20).half())
    kinds = {name: hosts["layers"][name]["format"] for name in CALIBRATED}
    assert kinds == {
        "d.int4": "iec_int4", "d.int4_branch": "iec_int4", "d.int8_conv_branch": "iec_int8", "d.int8": "int8_tensorwise",
    }  # fmt: skip
    with QuantizedFile(path) as file:
        for name in ALL:
            assert file.layers[name] == LayerFile(*ALL[name]) and torch.equal(file.packed(name), packed_of(name)), name


def test_layers_patched_after_quantization_are_read_from_a_version_3_file(path):
    save(path, names=(*ALL, *CHANGED))
    with safetensors.safe_open(path, "pt") as file:
        about, hosts = (json.loads(file.metadata()[key]) for key in ("iec.quantized", "_quantization_metadata"))
    assert about["version"] == 3
    assert [hosts["layers"][name]["format"] for name in CHANGED] == ["iec_int4", "iec_fp8"]  # unknown to the host
    with QuantizedFile(path) as file:
        for name in (*ALL, *CHANGED):
            assert file.layers[name] == LayerFile(*EVERY[name]) and torch.equal(file.packed(name), packed_of(name)), name


@pytest.mark.parametrize("bits", [8, 16])
def test_rotated_int4_layers_are_written_in_the_hosts_format(path, bits):
    """Version 4: signed bytes, the lower half first, one dimension of scales; activations in 8 bits, not in the host's 4."""
    save(path, names=tuple(EVERY), activation={"bits": bits, "per_tensor": False})
    with safetensors.safe_open(path, "pt") as file:
        about, hosts = (json.loads(file.metadata()[key]) for key in ("iec.quantized", "_quantization_metadata"))
        for name, (shape, fmt) in HOSTS_INT4.items():
            stored, scale = file.get_tensor(f"{name}.weight"), file.get_tensor(f"{name}.weight_scale")
            described = json.loads(bytes(file.get_tensor(f"{name}.comfy_quant").tolist()))
            wanted = {"format": "convrot_w4a4", "convrot_groupsize": fmt.rotation, "linear_dtype": "int8"}
            assert described == hosts["layers"][name] == wanted | ({"full_precision_matrix_mult": True} if bits == 16 else {})
            assert (stored.dtype, stored.shape) == (torch.int8, (shape[0], shape[1] // 2))
            assert (scale.dtype, scale.shape) == (torch.float32, (shape[0],))
            unsigned = stored.int() & 255
            pairs = torch.stack([unsigned & 15, unsigned >> 4], 2).flatten(1)
            rows = torch.where(pairs > 7, pairs - 16, pairs).double() * scale.double()[:, None]
            assert (rows - rows_of(weight_of(name), fmt.rotation)).abs().max() <= scale.max() * 0.5001
    assert about["version"] == 4 and hosts["layers"]["a.int4_groups_rotated"]["format"] == "iec_int4"
    with QuantizedFile(path) as file:
        for name in EVERY:
            assert file.layers[name] == LayerFile(*EVERY[name]) and torch.equal(file.packed(name), packed_of(name)), name


def test_groups_of_two_scales_are_written_in_the_hosts_format(path):
    """Version 4: numbers from 0 to 15, levels, the bits of the float8 shares, and scales of channels.

    Rotated Linear layers without a branch have the host's format name.
    """
    save(path, names=tuple(EVERY))
    hosts = {"g.rotated", "g.calibrated"}
    with safetensors.safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
        for name, (shape, fmt) in TWO_SCALES.items():
            wanted = {"format": "asym_w4a8_int8", "convrot_groupsize": fmt.rotation, "group_size": fmt.group_size}
            assert layers[name] == wanted if name in hosts else layers[name]["format"] == "iec_int4"
            keys = ("weight", "weight_s_rel", "weight_s_channel", "weight_codebook")
            stored, shares, channel, levels = (file.get_tensor(f"{name}.{key}") for key in keys)
            inputs = math.prod(shape[1:])
            assert (shares.dtype, shares.shape) == (torch.uint8, (shape[0], inputs // fmt.group_size))
            assert (channel.dtype, channel.shape, levels.shape) == (torch.float32, (shape[0],), (16,))
            unsigned = stored.int() & 255
            numbers = torch.stack([unsigned & 15, unsigned >> 4], 2).flatten(1)
            numbers = numbers if name in hosts else numbers ^ 8
            scaled = levels.double()[numbers].unflatten(1, (shares.shape[1], -1))
            scaled = (scaled * shares.view(torch.float8_e4m3fn).double()[..., None]).round()
            rows = (scaled * channel.double()[:, None, None]).flatten(1)
            assert (rows - rows_of(weight_of(name), fmt.rotation)).norm() < 0.11 * rows.norm()
    with QuantizedFile(path) as file:
        for name in EVERY:
            assert file.layers[name] == LayerFile(*EVERY[name]) and torch.equal(file.packed(name), packed_of(name)), name


def test_other_levels_are_refused(path):
    save(path, names=("a.int8", "g.rotated"), plain={})
    header, metadata, about, data = taken_apart(path.read_bytes())
    begin = header["g.rotated.weight_codebook"]["data_offsets"][0]
    path.write_bytes(put_together(header, metadata, about, data[:begin] + b"\x01" + data[begin + 1 :]))
    with (
        pytest.raises(ValueError, match=r"^g\.rotated has levels for its 4 bits that these nodes do not know"),
        QuantizedFile(path) as file,
    ):
        file.packed("g.rotated")


def test_rotated_int4_layers_of_older_files_are_read(path):
    """Version 3 stored them in its own format."""
    layers = {name: LayerFile(*layer, version=3) for name, layer in HOSTS_INT4.items()}
    tensors = {}
    for name, layer in layers.items():
        tensors |= layer_tensors(name, layer, packed_of(name), 8)
        assert tensors[f"{name}.weight"].dtype == torch.uint8 and tensors[f"{name}.weight_scale"].shape == (layer.shape[0], 1)
    sources = {key: (tensor.dtype, tensor.shape, lambda tensor=tensor: tensor) for key, tensor in tensors.items()}
    write(path, sources, description(layers, **ABOUT, fingerprint=normal(4)))
    with QuantizedFile(path) as file:
        assert {layer.version for layer in file.layers.values()} == {2}  # one of them is calibrated
        assert all(torch.equal(file.packed(name), packed_of(name)) for name in layers)


def test_activation_scales_are_read_from_a_version_4_file(path):
    before = activation_scales(fingerprint=normal(40, seed=9))
    with QuantizedFile(save(path, scales=before)) as file:
        after, plain = file.scales(), set(file.plain)
        assert all(torch.equal(file.packed(name), packed_of(name)) for name in LAYERS)
    assert plain == set(PLAIN)
    assert (after.facts, after.names) == (before.facts, before.names)
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("fingerprint", "sigmas", "table"))
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["iec.quantized"])["version"] == 4
        assert torch.equal(file.get_tensor("iec.activation_scales.table"), before.table)
    with QuantizedFile(save(path)) as file:
        assert file.scales() is None


SPOILED_SCALES = {
    "no table": lambda header, *_: rename(header, "iec.activation_scales.table", "x"),
    "sigmas of another type": lambda header, *_: header["iec.activation_scales.sigmas"].update(dtype="I64"),
    "other names": lambda header, metadata, about, data: about["activation_scales"].update(names='["a.int8"]'),
    "no facts": lambda header, metadata, about, data: about["activation_scales"].pop("facts"),
    "a list": lambda header, metadata, about, data: about.update(activation_scales=[1]),
}
SCALES_OF_OTHERS = {
    "an unknown layer": lambda header, metadata, about, data: about["activation_scales"].update(names='["a.int8", "b"]'),
    "another quantization": lambda header, metadata, about, data: about.update(name="W4A8"),
}


@pytest.mark.parametrize("kind", [*SPOILED_SCALES, *SCALES_OF_OTHERS])
def test_damaged_or_foreign_scales_are_refused(path, kind):
    save(path, names=("a.int8", "c.fp8"), plain={}, scales=activation_scales(fingerprint=normal(40, seed=9)))
    header, metadata, about, data = taken_apart(path.read_bytes())
    (SPOILED_SCALES | SCALES_OF_OTHERS)[kind](header, metadata, about, data)
    path.write_bytes(put_together(header, metadata, about, data))
    wanted = "are damaged" if kind in SPOILED_SCALES else "are not those of its layers"
    with pytest.raises(ValueError, match=f"^its scales of activations {wanted}$"), QuantizedFile(path) as file:
        file.scales()


def test_scales_in_an_older_file_are_ignored(path):
    save(path, names=("a.int8", "c.fp8"), plain={}, scales=activation_scales(fingerprint=normal(40, seed=9)))
    header, metadata, about, data = taken_apart(path.read_bytes())
    about["version"] = 2
    for layer in about["layers"].values():
        del layer["format"]["two_scales"]
    path.write_bytes(put_together(header, metadata, about, data))
    with QuantizedFile(path) as file:
        assert file.scales() is None
        assert set(file.plain) == {"iec.activation_scales.table", "iec.activation_scales.sigmas"}  # which no network has


def test_a_file_without_calibrated_layers_is_one_that_older_packs_read(path):
    with safetensors.safe_open(save(path), "pt") as file:
        about = json.loads(file.metadata()["iec.quantized"])
    assert about["version"] == 1
    assert all(set(layer["format"]) == {"kind", "group_size", "rotation", "search"} for layer in about["layers"].values())


BRANCH = "d.int4_branch"
CALIBRATED_CHANGES = {
    "no factor": (lambda header, *_: rename(header, f"{BRANCH}.weight_in", "x"), f"^'{BRANCH}.weight_in' is missing"),
    "a factor of another shape": (
        lambda header, *_: header[f"{BRANCH}.weight_in"].update(shape=[20, 3]), f"^{BRANCH}.weight_in has shape"
    ),
    "a factor of another type": (
        lambda header, *_: header[f"{BRANCH}.weight_out"].update(dtype="BF16"), f"^{BRANCH}.weight_out is BF16, but should"
    ),
    "a huge rank": (lambda *given: layer_change(BRANCH, {"rank": 2**61})(*given), "^its description has a layer whose format"),
    "another rank": (lambda *given: layer_change(BRANCH, {"rank": 4})(*given), f"^{BRANCH}.weight_out has shape"),
    "a negative rank": (lambda *given: layer_change(BRANCH, {"rank": -3})(*given), "^its description has an invalid layer"),
    "a rank with a fraction": (
        lambda *given: layer_change(BRANCH, {"rank": 3.0})(*given), "^its description has an invalid layer"
    ),
    "a rank without calibration": (
        lambda *given: layer_change(BRANCH, {"calibrated": False})(*given), "^its description has an invalid layer"
    ),
    "a switch that is a number": (
        lambda *given: layer_change(BRANCH, {"calibrated": 1})(*given), "^its description has an invalid layer"
    ),
    "an unknown type of factors": (
        lambda *given: layer_change(BRANCH, {"factors": "float64"})(*given), "^its description has an invalid layer"
    ),
    "a type of factors that is a list": (
        lambda *given: layer_change(BRANCH, {"factors": []})(*given), "^its description is damaged .TypeError"
    ),
    "the first version": (
        lambda header, metadata, about, data: about.update(version=1), "^its description has a layer with other entries"
    ),
    "a layer as of the first version": (
        lambda header, metadata, about, data: about["layers"]["d.int4"]["format"].pop("rank"),
        "^its description has a layer with other entries",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALIBRATED_CHANGES)
def test_a_changed_file_of_calibrated_layers_is_refused(path, kind):
    header, metadata, about, data = taken_apart(save(path, names=tuple(ALL)).read_bytes())
    change, message = CALIBRATED_CHANGES[kind]
    change(header, metadata, about, data)
    path.write_bytes(put_together(header, metadata, about, data))
    assert re.search(message, refusal(path)), refusal(path)


def test_saving_a_loaded_file_gives_the_same_file(path, tmp_path):
    """Writing the contents of a file gives the same bytes."""
    with QuantizedFile(save(path)) as file:
        tensors = {key: file.tensor(key) for key in file._tensors}
        sources = {key: (tensor.dtype, tensor.shape, lambda tensor=tensor: tensor) for key, tensor in tensors.items()}
        about = {**file.about, "fingerprint": torch.tensor(file.about["fingerprint"])}
        write(tmp_path / "again", sources, description(file.layers, **about, settings=file.settings))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_tensors_are_aligned(path):
    header = taken_apart(save(path).read_bytes())[0]
    sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}
    odd = [name for name, entry in header.items() if math.prod(entry["shape"]) % 2]
    assert len(odd) > 3  # so that unsorted writing would not pass
    assert all(entry["data_offsets"][0] % sizes.get(entry["dtype"], 1) == 0 for entry in header.values())
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0


def test_one_tensor_at_a_time_is_held(path):
    alive, most = weakref.WeakSet(), []

    def get():
        tensor = torch.zeros(1000)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    write(path, {f"w{number}": (torch.float32, (1000,), get) for number in range(20)}, {})
    assert len(most) == 20 and max(most) == 1
    assert len(safetensors.torch.load_file(path)) == 20


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((torch.float32, (2,), lambda: torch.zeros(3)), "w is torch.float32 .3,., but should be torch.float32 .2,."),
        ((torch.float32, (2,), lambda: torch.zeros(2, dtype=torch.float64)), "w is torch.float64"),
        (
            (torch.complex64, (2,), lambda: torch.zeros(2)),
            "^model: its weight w .torch.complex64, 1 dimensions. cannot be stored",
        ),
        ((torch.float32, (1,) * 9, lambda: torch.zeros((1,) * 9)), "^model: its weight w .torch.float32, 9 dimensions. cannot"),
    ],
)
def test_unreadable_content_is_not_written(path, source, message):
    with pytest.raises(ValueError, match=message):
        write(path, {"w": source}, {})


@pytest.mark.parametrize("key", ["", "../x", "a..b", "a b", "a/b", ".a", "a.", "a\nb", "\u00e9"])
def test_unreadable_names_are_not_written(path, key):
    with pytest.raises(ValueError, match=r"^model: its weight "):
        write(path, {key: (torch.float32, (1,), lambda: torch.zeros(1))}, {})
    assert not path.exists()


@pytest.mark.parametrize("value", [float("nan"), 10**6, {"a": 1}, [[1]], "x" * 300, torch.float32])
def test_unreadable_settings_are_not_written(path, value):
    with pytest.raises(ValueError, match=r"^model: it cannot be saved, because "):
        save(path, settings={"x": value})


# Refusals


def taken_apart(raw):
    """Return (header without metadata, metadata, description, data) of a file."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    return header, metadata, json.loads(metadata["iec.quantized"]), raw[8 + length :]


def put_together(header, metadata, about, data):
    whole = {"__metadata__": metadata | {"iec.quantized": json.dumps(about)}, **header}
    text = json.dumps(whole).encode()
    return len(text).to_bytes(8, "little") + text + data


def moved(header, data):
    """Return the data for a header, each tensor at its place: offsets and length are corrected."""
    parts, at = [], 0
    sizes = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "F16": 2}
    for entry in header.values():
        size = math.prod(entry["shape"]) * sizes.get(entry["dtype"], 1)
        old = data[entry["data_offsets"][0] : entry["data_offsets"][1]]
        parts.append(old[:size].ljust(size, b"\0"))
        entry["data_offsets"] = [at, at + size]
        at += size
    return b"".join(parts)


def header_change(change):
    """Return a change of the header after which all offsets are correct again."""

    def run(header, metadata, about, data):
        change(header)
        return moved(header, data)

    return run


def entry_change(key, **fields):
    """Return a change of an entry that leaves the offsets unchanged."""
    return lambda header, metadata, about, data: header[key].update(fields)


def about_change(change):
    return lambda header, metadata, about, data: change(about)


def layer_change(name, fields=None, **entry):
    return about_change(
        lambda about: (about["layers"][name].update(entry), about["layers"][name]["format"].update(fields or {}))
    )


def rename(header, old, new):
    header[new] = header.pop(old)


A, SCALE = "a.int8.weight", "a.int8.weight_scale"
CANNOT = "^its description has an invalid layer "
NOT_WITH = "^its description has a layer whose format does not fit its shape"
CHANGES = {
    "no weight": (header_change(lambda header: header.pop(A)), "^'a.int8.weight' is missing"),
    "no scale": (header_change(lambda header: header.pop(SCALE)), "^'a.int8.weight_scale' is missing"),
    "no description": (header_change(lambda header: header.pop("a.int8.comfy_quant")), "^'a.int8.comfy_quant' is missing"),
    "a weight of another type": (entry_change(A, dtype="U8"), "^a.int8.weight is U8, but should be I8"),
    "a scale of another type": (
        header_change(lambda header: header[SCALE].update(dtype="F16")), "^a.int8.weight_scale is F16, but should be F32"
    ),
    "a weight of another shape": (
        entry_change(A, shape=[20, 6]), r"^a.int8.weight has shape \(20, 6\), but should have \(6, 20\)"
    ),
    "a weight of one dimension": (entry_change(A, shape=[120]), r"^a.int8.weight has shape \(120,\)"),
    "a smaller weight": (
        header_change(lambda header: header[A].update(shape=[5, 20])), r"^a.int8.weight has shape \(5, 20\), but should have"
    ),
    "a scale for each group": (
        header_change(lambda header: header[SCALE].update(shape=[6, 2])), r"^a.int8.weight_scale has shape \(6, 2\)"
    ),
    "a scale for each row of fp8": (
        header_change(lambda header: header["c.fp8.weight_scale"].update(shape=[16, 1])), "^c.fp8.weight_scale has shape"
    ),
    "a name that leads elsewhere": (
        lambda header, *_: rename(header, "norm.weight", "../../x"), r"^it has a tensor named '../../x', which is not a name"
    ),
    "an absolute name": (lambda header, *_: rename(header, "norm.weight", "/etc/x"), "^it has a tensor named '/etc/x'"),
    "a layer whose name leads elsewhere": (
        about_change(lambda about: rename(about["layers"], "a.int8", "../../x")), "^'../../x.weight' is missing"
    ),
    "a name with a line break": (
        lambda header, *_: rename(header, "norm.weight", "a\nb"), r"^it has a tensor named 'a\\nb'"
    ),
    "a very long name": (lambda header, *_: rename(header, "norm.weight", "/" * 9999), "^it has a tensor named '/////"),
    "an unknown type": (entry_change(A, dtype="F4"), "^'a.int8.weight' has an unknown type .'F4'."),
    "a type that is no text": (entry_change(A, dtype=["I8"]), "^'a.int8.weight' has an unknown type"),
    "a negative size": (entry_change(A, shape=[-6, -20]), "^'a.int8.weight' has an invalid shape or place"),
    "a size with a fraction": (entry_change(A, shape=[6.0, 20]), "^'a.int8.weight' has an invalid shape or place"),
    "a size that is true": (
        entry_change("x.pos_embed", shape=[True, 3, 2]), "^'x.pos_embed' has an invalid shape or place"
    ),
    "a size that is text": (entry_change(A, shape="620"), "^'a.int8.weight' has an invalid shape or place"),
    "a huge size": (
        entry_change(A, shape=[2**40, 2**20]), "^'a.int8.weight' has shape .* and type I8, which do not match its bytes"
    ),
    "a size beyond any": (entry_change(A, shape=[2**63, 0]), "^'a.int8.weight' has an invalid shape or place"),
    "nine dimensions": (entry_change(A, shape=[6, 20] + [1] * 7), "^'a.int8.weight' has an invalid shape or place"),
    "a hundred thousand dimensions": (
        entry_change(A, shape=[9] * 100000), "^'a.int8.weight' has an invalid shape or place"
    ),
    "a place with a fraction": (
        entry_change(A, data_offsets=[0.0, 120.0]), "^'a.int8.weight' has an invalid shape or place"
    ),
    "a negative place": (entry_change(A, data_offsets=[-120, 0]), "^'a.int8.weight' has an invalid shape or place"),
    "a place of one number": (entry_change(A, data_offsets=[120]), "^'a.int8.weight' has an invalid shape or place"),
    "a place far off": (entry_change(A, data_offsets=[2**50, 2**50 + 120]), "has a gap or an overlap before it"),
    "two tensors at one place": (
        lambda header, *_: header[A].update(data_offsets=header["a.int8_search.weight"]["data_offsets"]),
        "has a gap or an overlap before it",
    ),
    "an entry that is no table": (
        lambda header, *_: header.update({A: [1]}), "^'a.int8.weight' is not described by dtype, shape"
    ),
    "an entry with more": (entry_change(A, more=1), "^'a.int8.weight' is not described by dtype, shape"),
    "metadata that are no texts": (
        lambda header, metadata, *_: metadata.update(more=1), "^its header is damaged .the metadata are not a table of texts"
    ),
    "another version": (
        about_change(lambda about: about.update(version=5)), "^it is of version 5, but only versions 1 to 4 can be read"
    ),
    "a version that is true": (about_change(lambda about: about.update(version=True)), "^it is of version True"),
    "a version that is text": (about_change(lambda about: about.update(version="1")), "^it is of version '1'"),
    "no layers": (about_change(lambda about: about.pop("layers")), "^its description is damaged .KeyError: 'layers'"),
    "layers in a list": (about_change(lambda about: about.update(layers=[1])), "^its description is damaged .AttributeError"),
    "an empty table of layers": (about_change(lambda about: about.update(layers={})), "^its description has no layer"),
    "a layer that is no table": (
        about_change(lambda about: about["layers"].update({"a.int8": "x"})), "^its description has a layer with other entries"
    ),
    "no format": (
        about_change(lambda about: about["layers"]["a.int8"].pop("format")), "^its description has a layer with other entries"
    ),
    "a layer that is null": (
        about_change(lambda about: about["layers"].update({"a.int8": None})), "^its description is damaged .TypeError"
    ),
    "a layer's size with a fraction": (layer_change("a.int8", shape=[6.0, 20]), CANNOT),
    "a layer's size that is true": (layer_change("a.int8", shape=[True, 20]), CANNOT),
    "a layer's size that is text": (layer_change("a.int8", shape=["6", "20"]), CANNOT),
    "a layer's negative size": (layer_change("a.int8", shape=[-6, -20]), CANNOT),
    "a layer's size of zero": (layer_change("a.int8", shape=[0, 20]), CANNOT),
    "a layer's huge size": (layer_change("a.int8", shape=[2**62, 20]), CANNOT),
    "a layer's large size": (layer_change("a.int8", shape=[2**61, 2**61]), "^a.int8.weight has shape"),
    "a layer of three dimensions": (layer_change("a.int8", shape=[6, 5, 4]), CANNOT),
    "a layer of very many dimensions": (layer_change("a.int8", shape=[2] * 99999), CANNOT),
    "an unknown kind": (layer_change("a.int8", {"kind": "int2"}), CANNOT),
    "a kind that is a list": (layer_change("a.int8", {"kind": ["int8"]}), "^its description is damaged .TypeError"),
    "a group with a fraction": (layer_change("a.int8_groups", {"group_size": 32.0}), CANNOT),
    "a group that is true": (layer_change("a.int8", {"group_size": True}), CANNOT),
    "a negative group": (layer_change("a.int8_groups", {"group_size": -32}), CANNOT),
    "a group that does not divide": (layer_change("a.int8_groups", {"group_size": 36}), NOT_WITH),
    "a huge group": (layer_change("a.int8_groups", {"group_size": 2**61}), NOT_WITH),
    "other groups": (layer_change("a.int8_groups", {"group_size": 48}), r"^a.int8_groups.weight_scale has shape \(6, 3\)"),
    "groups of fp8": (layer_change("c.fp8", {"group_size": 16}), NOT_WITH),
    "a rotation that is none": (layer_change("a.int8_rotated", {"rotation": 32}), CANNOT),
    "a rotation with a fraction": (layer_change("a.int8_rotated", {"rotation": 64.0}), CANNOT),
    "a negative rotation": (layer_change("a.int8_rotated", {"rotation": -64}), CANNOT),
    "a huge rotation": (layer_change("c.fp8_rotated", {"rotation": 4**20}), CANNOT),
    "a rotation that does not divide": (layer_change("a.int8", {"rotation": 16}), NOT_WITH),
    "a rotation of a convolution": (layer_change("b.int8_conv_groups", {"rotation": 16}), NOT_WITH),
    "another rotation": (layer_change("c.fp8", {"rotation": 16}), r"^c.fp8.comfy_quant has shape"),
    "a search that is a number": (layer_change("a.int8", {"search": 1}), CANNOT),
    "a format with more": (layer_change("a.int8", {"more": 1}), "^its description has a layer with other entries than sh"),
    "activations of 4 bits": (
        about_change(lambda about: about["activation"].update(bits=4)), "^its description has invalid activations"
    ),
    "bits with a fraction": (
        about_change(lambda about: about["activation"].update(bits=8.0)), "^its description has invalid activations"
    ),
    "activations with more": (
        about_change(lambda about: about["activation"].update(more=1)), "^its description has invalid activations"
    ),
    "a switch that is a number": (
        about_change(lambda about: about["activation"].update(per_tensor=0)), "^its description has invalid activations"
    ),
    "activations in a list": (about_change(lambda about: about.update(activation=[8])), "^its description "),
    "a network in float64": (
        about_change(lambda about: about.update(dtype="float64")), "^its description has an invalid type of network"
    ),
    "a name that is a number": (
        about_change(lambda about: about.update(name=8)), "^its description has a name that is not text"
    ),
    "a name that cannot be shown": (
        about_change(lambda about: about.update(name="W8\n\ud800")), "^its description has a name that is not text"
    ),
    "NaN in the fingerprint": (
        about_change(lambda about: about["fingerprint"].__setitem__(3, math.nan)), "^its fingerprint is damaged"
    ),
    "infinity in the fingerprint": (
        about_change(lambda about: about["fingerprint"].__setitem__(3, -math.inf)), "^its fingerprint is damaged"
    ),
    "a huge number in the fingerprint": (
        about_change(lambda about: about["fingerprint"].__setitem__(3, 10**400)), "^its description is damaged .OverflowError"
    ),
    "text in the fingerprint": (
        about_change(lambda about: about["fingerprint"].__setitem__(3, "1")), "^its fingerprint is damaged"
    ),
    "a very long fingerprint": (
        about_change(lambda about: about.update(fingerprint=[0.5] * 5000)), "^its fingerprint is damaged"
    ),
    "no fingerprint": (about_change(lambda about: about.pop("fingerprint")), "^its description is damaged .KeyError"),
    "a setting that is a table": (
        lambda header, metadata, *_: metadata.update(config='{"transformer": {"x": {}}}'), "^its settings of the network"
    ),
    "a huge setting": (
        lambda header, metadata, *_: metadata.update(config='{"transformer": {"layers": 10000000}}'), "^its settings of the net"
    ),
    "settings in a list": (
        lambda header, metadata, *_: metadata.update(config="[1]"), "^its settings of the network are invalid"
    ),
    "settings that cannot be parsed": (
        lambda header, metadata, *_: metadata.update(config="{"), "^its settings of the network is damaged"
    ),
}  # fmt: skip


def refusal(path):
    """Return the sentence with which a file is refused."""
    with pytest.raises(ValueError) as refused:
        QuantizedFile(path)
    sentence = str(refused.value)
    assert 10 < len(sentence) < 700 and sentence.isprintable(), sentence
    return sentence


@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_with_changed_content_is_refused(path, kind):
    header, metadata, about, data = taken_apart(save(path).read_bytes())
    path.write_bytes(put_together(header, metadata, about, data))
    QuantizedFile(path).close()  # so that only the change can be the reason
    change, message = CHANGES[kind]
    changed = change(header, metadata, about, data)
    path.write_bytes(put_together(header, metadata, about, changed if isinstance(changed, bytes) else data))
    assert re.search(message, refusal(path)), refusal(path)


def with_header(raw, text):
    length = int.from_bytes(raw[:8], "little")
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def with_length(raw, length):
    return length.to_bytes(8, "little") + raw[8:]


def with_description(raw, text):
    header, metadata, _, data = taken_apart(raw)
    whole = json.dumps({"__metadata__": metadata | {"iec.quantized": text}, **header}).encode()
    return len(whole).to_bytes(8, "little") + whole + data


NO_FILE = "^it is not a .safetensors file, or it is damaged .its header would have"
BYTES = {
    "nothing": (lambda raw: b"", NO_FILE),
    "three bytes": (lambda raw: raw[:3], NO_FILE),
    "no header": (lambda raw: raw[:8], NO_FILE),
    "a picture": (lambda raw: b"\x89PNG\r\n\x1a\n" + raw, NO_FILE),
    "half a header": (lambda raw: raw[:500], NO_FILE),
    "a header longer than the file": (lambda raw: with_length(raw, len(raw)), NO_FILE),
    "a header longer than any": (lambda raw: with_length(raw, 2**64 - 1), NO_FILE),
    "no length": (lambda raw: with_length(raw, 0), NO_FILE),
    "a shorter header": (lambda raw: with_length(raw, 200), "^its header is damaged"),
    "truncated data": (lambda raw: raw[:-1], "^it is truncated or too long"),
    "half the data": (lambda raw: raw[: -len(raw) // 8], "^it is truncated or too long"),
    "more data": (lambda raw: raw + b"\0", "^it is truncated or too long"),
    "no JSON": (lambda raw: with_header(raw, b"x" * 64), "^its header is damaged"),
    "no UTF-8": (lambda raw: with_header(raw, b'{"\xff\xfe": 1}'), "^it is not a .safetensors file, or its header is damaged"),
    "UTF-16": (
        lambda raw: with_header(raw, '{"a": 1}'.encode("utf-16")), "^it is not a .safetensors file, or its header is damaged"
    ),
    "a mark of byte order": (lambda raw: with_header(raw, b"\xef\xbb\xbf{}"), "^its header is damaged"),
    "a list": (lambda raw: with_header(raw, b"[1, 2]"), "^it is not a .safetensors file, or its header is damaged"),
    "a header after blanks": (
        lambda raw: with_header(raw, b"  {}"), "^it is not a .safetensors file, or its header is damaged"
    ),
    "deep nesting": (lambda raw: with_header(raw, b"[" * 200000), "^its header is damaged .maximum recursion depth"),
    "deep nesting in a table": (
        lambda raw: with_header(raw, b'{"a":' * 200000), "^its header is damaged .maximum recursion depth"
    ),
    "a number of very many digits": (lambda raw: with_header(raw, b'{"a": ' + b"9" * 100000 + b"}"), "^its header is damaged"),
    "metadata twice": (lambda raw: with_header(raw, b'{"__metadata__": {}, "__metadata__": {}}'), "a name occurs twice"),
    "no metadata": (lambda raw: (2).to_bytes(8, "little") + b"{}", "^it was not written by Save Quantized Model"),
    "a description that is no JSON": (lambda raw: with_description(raw, "{"), "^its description is damaged"),
    "a deeply nested description": (
        lambda raw: with_description(raw, "[" * 200000), "^its description is damaged .maximum recursion depth"
    ),
    "a description that is a number": (lambda raw: with_description(raw, "1"), "^it is of version None"),
    "a description that is null": (lambda raw: with_description(raw, "null"), "^it is of version None"),
    "a name twice": (
        lambda raw: with_description(raw, json.dumps(taken_apart(raw)[2])[:-1] + ', "version": 1}'), "a name occurs twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_malformed_files_are_refused(path, kind):
    change, message = BYTES[kind]
    path.write_bytes(change(save(path).read_bytes()))
    assert re.search(message, refusal(path)), refusal(path)


def test_files_of_other_programs_are_refused(path, tmp_path):
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    assert refusal(path).startswith("it was not written by Save Quantized Model (IEC); load it with ComfyUI's own node")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, {"format": "pt", "_quantization_metadata": '{"layers": {}}'})
    assert refusal(path).startswith("it was not written by")
    assert refusal(tmp_path).startswith("it cannot be opened")
    assert refusal(tmp_path / "none") == "it cannot be opened (No such file or directory)"  # without its path


def test_a_header_larger_than_its_file_is_refused_with_the_limit_of_this_file(path):
    raw = save(path).read_bytes()
    path.write_bytes(with_length(raw, len(raw)))
    assert refusal(path).endswith(
        f"(its header would have {len(raw)} of its {len(raw)} bytes, but can have 2 to {len(raw) - 8})"
    )
    path.write_bytes(raw[:9])
    assert refusal(path).endswith(" of its 9 bytes, but a file of this size has no header)")


def test_a_header_larger_than_any_networks_is_not_parsed(path, monkeypatch):
    save(path)
    for module in (quantized_file, safetensors_header):
        monkeypatch.setattr(module, "LARGEST_HEADER", 1000)
    assert re.search(NO_FILE, refusal(path)) and refusal(path).endswith("but can have 2 to 1000)")
    with pytest.raises(ValueError, match=r"^model: it has too many layers for a file of this kind"):
        save(path)


def test_a_file_that_becomes_shorter_is_reported(path):
    with QuantizedFile(save(path)) as file:
        with open(path, "r+b") as other:
            other.truncate(path.stat().st_size // 2)
        with pytest.raises(ValueError, match=r"^it has become shorter; .* is incomplete"):
            [file.packed(name) for name in file.layers] + [file.tensor(key) for key in file.plain]


# Thousands of damaged files

JUNK = [
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**40, 2**53, 2**62, 2**63, 2**64, 10**30, -(2**63), 10**400,
    1.0, 0.5, -0.0, math.nan, math.inf, 1e308, "", "x", "I8", "F32", "BOOL", "int4", "../../x", "a" * 3000, "\ud800", "\n", [],
    [0], [1, 1], [2**31, 2**31], [2**40] * 8, [[[]]], {}, {"a": 1},
    {"kind": "int8", "group_size": 0, "rotation": 0, "search": False},
]  # fmt: skip


def places_in(node, path=()):
    """Return all paths to the values in nested tables and lists."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((*path, key))
        if isinstance(value, (dict, list)):
            found += places_in(value, found[-1])
    return found


def at(node, path):
    for key in path:
        node = node[key]
    return node


def change_of_json(rng, tree):
    """Change one thing in a tree of tables and lists."""
    path = rng.choice(places_in(tree))
    owner, key, kind = at(tree, path[:-1]), path[-1], rng.randrange(6)
    value = owner[key]
    if kind == 0:
        owner[key] = rng.choice(JUNK)
    elif kind == 1:
        del owner[key]
    elif kind == 2 and isinstance(value, int):
        owner[key] = rng.choice([value + 1, value - 1, -value, 2 * value, value // 2, value * 2**32, float(value)])
    elif kind == 3 and isinstance(owner, dict):
        owner[str(rng.choice(JUNK))] = owner.pop(key)
    elif kind == 4:
        other = rng.choice(places_in(tree))
        owner[key] = json.loads(json.dumps(at(tree, other)))
    elif isinstance(owner, list):
        rng.shuffle(owner)
    else:
        owner[key] = rng.choice(JUNK)


def damaged_json(rng, raw):
    header, metadata, about, data = taken_apart(raw)
    tree = {"header": header, "about": about, "metadata": metadata}
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        change_of_json(rng, tree)
    if rng.random() < 0.5:  # so that later checks than that of the offsets are reached
        try:
            if sum(math.prod(entry["shape"]) for entry in tree["header"].values()) < 1e5:
                data = moved(tree["header"], data)
        except (TypeError, KeyError, AttributeError, ValueError, IndexError, OverflowError):
            pass
    try:
        return put_together(tree["header"], tree["metadata"], tree["about"], data)
    except (TypeError, KeyError):  # the header itself is gone
        return put_together({}, {}, tree.get("about"), data)


def damaged_text(rng, raw):
    """Duplicate a name or a value, or swap two of them, in the header's text."""
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode()
    parts = re.split("([,:{}\\[\\]])", text)
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    if rng.random() < 0.5:
        parts[one], parts[other] = parts[other], parts[one]
    else:
        parts.insert(one, "".join(parts[one : one + rng.choice([1, 2, 4, 8])]))
    return with_header(raw, "".join(parts).encode())


def damaged_bytes(rng, raw):
    raw, length = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    where = rng.choice([(0, 8), (8, length), (length, len(raw)), (0, len(raw))])
    kind, place = rng.randrange(5), rng.randrange(*where)
    if kind == 0:
        for _ in range(rng.choice([1, 2, 8])):
            raw[rng.randrange(*where)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[place : place + rng.choice([1, 8, 64, len(raw)])]
    elif kind == 2:
        raw[place:place] = rng.randbytes(rng.choice([1, 8, 64]))
    elif kind == 3:
        raw[place : place + 8] = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(raw), len(raw) - 8]).to_bytes(8, "little")
    else:
        raw[place : place + 8] = raw[where[0] : where[0] + 8]
    return bytes(raw)


class Allocations(TorchDispatchMode):
    """Sum the bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        held = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in held:
            self.bytes += out.untyped_storage().nbytes()
        return out


def check_what_was_read(path, file, tensors, packed):
    """Check that an accepted file gives the library's tensors, and weights of the described shapes."""
    with safetensors.safe_open(path, "pt") as library:
        for key, tensor in tensors.items():
            assert torch.equal(as_bytes(tensor), as_bytes(library.get_tensor(key)))
        for name, weight in packed.items():
            packing = Packing(file.layers[name].shape, file.layers[name].format)
            values, scale, *_ = packing.stored(weight)
            key = "weight_s_channel" if packing.format.two_scales else "weight_scale"
            assert torch.equal(as_bytes(values), as_bytes(library.get_tensor(f"{name}.weight")))
            assert torch.equal(as_bytes(scale)[:4], as_bytes(library.get_tensor(f"{name}.{key}"))[:4])
            assert packing.dequantize(weight).shape == file.layers[name].shape


def has_other_levels(file, name):
    """Return whether a layer has other levels; then reading it must be refused."""
    if not file.layers[name].format.two_scales or torch.equal(file.tensor(f"{name}.weight_codebook"), LEVELS):
        return False
    with pytest.raises(ValueError, match="has levels for its 4 bits that these nodes do not know"):
        file.packed(name)
    return True


def check_scales(file):
    """Check that the scales are valid, missing, or refused with a sentence."""
    try:
        scales = file.scales()
    except ValueError as error:
        assert str(error).startswith("its scales of activations are ")
    else:
        assert scales is None or set(scales.names) <= set(file.layers)


def outcome(path, raw, traced=True):
    """Read a file completely; return None, or the sentence with which it was refused.

    The memory and time of reading are checked; Python's own memory only if it is traced.
    """
    path.write_bytes(raw)
    began, taken = time.perf_counter(), Allocations()
    if traced:
        tracemalloc.start()  # only here, because it doubles the time of everything else
    try:
        try:
            with taken:
                file = QuantizedFile(path)
        except ValueError as error:
            sentence = str(error)
        else:
            sentence = None
            assert taken.bytes == 0
            with file, taken:
                tensors, packed = (
                    {key: file.tensor(key) for key in file.plain},
                    {name: file.packed(name) for name in file.layers if not has_other_levels(file, name)},
                )
                check_scales(file)
        peak = tracemalloc.get_traced_memory()[1]  # 0 if it is not traced
    finally:
        tracemalloc.stop()
    if sentence is None:
        assert taken.bytes <= 3 * len(raw)  # what is read, and a layer's parts in addition to their packed form
        check_what_was_read(path, file, tensors, packed)
    else:
        assert taken.bytes == 0 and 10 < len(sentence) < 900 and sentence.isprintable(), sentence
    assert peak < 2**20 + 40 * len(raw)
    assert time.perf_counter() - began < 5
    return sentence


SEEDS = range(8)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    small = {"x.weight": normal(2, 2)}
    one = save(folder / "one", ["a.int8"], small)
    other = save(folder / "other", ["a.int4_groups_rotated", "c.fp8_conv"], small, activation={"bits": 16, "per_tensor": True})
    scales = activation_scales(names=("a.int8", "f.int4"), fingerprint=normal(40, seed=9))
    newest = save(folder / "newest", ["a.int8", "f.int4", "g.plain"], small, scales=scales)
    whole = save(folder / "all", settings={"heads": 3, "dims": [4, 6]})
    return [path.read_bytes() for path in (one, other, newest, whole)]


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_files_are_read_or_refused(path, whole_files, seed):
    """Each of 400 files per seed is read completely, as the library reads it, or refused with a sentence.

    A refused file takes no memory, and an accepted file not more than it contains.
    """
    for raw in whole_files:
        assert outcome(path, raw, traced=False) is None  # so that imports on first use are not counted
    rng, sentences, most = random.Random(seed), [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(400):
        damage = (damaged_json, damaged_json, damaged_text, damaged_bytes)[number % 4]
        sentences.append(outcome(path, damage(rng, rng.choice(whole_files))))
    refused = [sentence for sentence in sentences if sentence]
    assert 200 < len(refused) < 400
    assert len({sentence[:12] for sentence in refused}) > 10  # many checks are reached
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 64 * 1024  # KiB
