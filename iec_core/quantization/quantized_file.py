"""Quantized models as .safetensors files.

A quantized layer is three tensors, named as ComfyUI names them: `<layer>.weight`, its integers or float8 numbers [O, K], of
int4 two to a byte; `<layer>.weight_scale`; `<layer>.comfy_quant`, its description (JSON in bytes). One with a low-rank branch
has two more, its factors `<layer>.weight_out` [O, r] and `<layer>.weight_in` [r, K]. The descriptions are in the header's
metadata too, where older hosts look for them. Linear layers without a branch are as ComfyUI (0.33 or later) has them, so that
it opens a file of such layers by itself, where it has their like: int8, rotated or not, float8 that is not rotated, and int4
that is, with one scale a channel in blocks of 64 or 256, in groups of two scales in blocks of 256. Groups of two scales, of any
layer, have `.weight_s_channel` [O], the shares `.weight_s_rel` [O, G] and the levels `.weight_codebook` [16] in place of
`.weight_scale`. All others are of formats that no host knows, and convolutions of shapes that its layers do not have, so that
it fails instead of taking them for something else. What only we need to know is in the metadata as `iec.quantized`; calibrated
scales of activations are two tensors more, `iec.activation_scales.table` [S, L] and `iec.activation_scales.sigmas` [S].

A file is read by its own header, which is checked before anything is allocated; then tensors are read one at a time, each into
memory of its own, so that no file stays mapped and what is allocated is never more than what the file holds.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field, fields

import torch

from ..file_kinds import QUANTIZED_KEY
from ..safetensors_header import LARGEST_HEADER, parsed, read_header, reason, short
from .activation_scales import ActivationScales
from .packing import FACTOR_DTYPES, LIMITS, Packing, WeightFormat, rotation_size
from .two_scales import LEVELS

# A file is of the first version that can describe it: 2 layers that are calibrated, 3 others with a branch, 4 scales of
# activations, groups of two scales, and layers of int4 as the host has them.
VERSIONS = 1, 2, 3, 4
HOST_KEY = "_quantization_metadata"  # ComfyUI's
CONFIG_KEY = "config"  # ComfyUI's too: {"transformer": what the weights do not tell of the network}
HOST_FORMATS = {"int8": "int8_tensorwise", "fp8": "float8_e4m3fn", "int4": "convrot_w4a4"}
HOST_TWO_SCALES = "asym_w4a8_int8"
# Sizes of blocks for which its kernels have the format, and it can also quantize a weight anew after a LoRA.
HOST_ROTATIONS = {"convrot_w4a4": (64, 256), HOST_TWO_SCALES: (256,)}
SCALES_KEY = "activation_scales"  # of the description: what is told of them
SCALES = "iec.activation_scales"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINCE_VERSION_2, SINCE_VERSION_4 = {"calibrated", "rank", "factors"}, {"two_scales"}  # of a WeightFormat
STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

LARGEST_DIMENSIONS = 8  # of a tensor
LARGEST_FINGERPRINT = 4096  # numbers


@dataclass(frozen=True)
class LayerFile:
    """How a layer is described in a file. shape: of its weight. format: a WeightFormat. version: of the file."""

    shape: tuple[int, ...]
    format: WeightFormat
    version: int = field(default=VERSIONS[-1], compare=False)

    @property
    def is_hosts(self):
        """Whether it is written as the host has it."""
        fmt = self.format
        if len(self.shape) != 2 or (fmt.group_size and not fmt.two_scales) or fmt.rank:
            return False
        if fmt.kind == "int4":
            return fmt.rotation in HOST_ROTATIONS[self._hosts_like] and self.version >= 4
        return fmt.kind == "int8" or not fmt.rotation  # float8 is not rotated there

    @property
    def is_hosts_int4(self):
        """Whether it is int4 as the host has it, in bytes with a sign and with one dimension of scales."""
        return self.is_hosts and self.format.kind == "int4"

    @property
    def host_format(self):
        """The name of its format for the host, which knows none of ours."""
        return self._hosts_like if self.is_hosts else f"iec_{self.format.kind}"

    @property
    def _hosts_like(self):
        return HOST_TWO_SCALES if self.format.two_scales else HOST_FORMATS[self.format.kind]


def host_description(layer, activation_bits):
    """Return the host's description of a layer, a dict."""
    about = {"format": layer.host_format}
    if activation_bits == 16:
        about["full_precision_matrix_mult"] = True
    if layer.is_hosts_int4:
        # Where there are no groups the host would round activations to 4 bits, were it not told otherwise.
        more = {"group_size": layer.format.group_size} if layer.format.two_scales else {"linear_dtype": "int8"}
        return about | {"convrot_groupsize": layer.format.rotation} | more
    if layer.format.rotation:
        about |= {"convrot": True, "convrot_groupsize": layer.format.rotation}
    return about


def _description_bytes(layer, activation_bits):
    text = json.dumps(host_description(layer, activation_bits)).encode()
    return text + b" " * (-len(text) % 8)  # so that what comes next stays aligned


def layer_tensors(name, layer, packed, activation_bits):
    """Return {key: tensor} of a layer: packed int8 [nbytes], as its Packing has it."""
    packing = Packing(layer.shape, layer.format)
    values, *scales = packing.stored(packed)
    return {
        f"{name}.weight": _hosts_nibbles(layer, values).view(_stored_dtype(layer)),
        **{f"{name}.{key}": _in_shape(scale, shape) for (key, (_, shape)), scale in zip(_scales_of(layer).items(), scales)},
        **({_codebook_name(name): LEVELS.clone()} if layer.format.two_scales else {}),
        f"{name}.comfy_quant": torch.tensor(list(_description_bytes(layer, activation_bits)), dtype=torch.uint8),
        **dict(zip(_factor_names(name), packing.factors(packed) or ())),
    }


def _codebook_name(name):
    return f"{name}.weight_codebook"


def _in_shape(scale, shape):
    """Return the first of the scales in a shape: float8 has the same for all rows."""
    return scale.flatten()[: math.prod(shape)].view(shape)


def _stored_dtype(layer):
    return torch.int8 if layer.is_hosts_int4 else STORED[layer.format.kind]


def _hosts_nibbles(layer, values):
    """Return values as they are stored in the file, or, of the file, as a Packing stores them: the host adds 8 to each of its
    int4 that has two scales.
    """
    return values ^ 0x88 if layer.host_format == HOST_TWO_SCALES else values


def _scales_of(layer):
    """Return {name: (dtype, shape)} of a layer's scales in a file, in the order of `Packing.stored`."""
    packing = Packing(layer.shape, layer.format)
    if layer.format.two_scales:
        return {
            "weight_s_channel": (torch.float32, (packing.rows,)), "weight_s_rel": (torch.uint8, (packing.rows, packing.groups))
        }  # fmt: skip
    if layer.format.kind == "fp8":
        return {"weight_scale": (torch.float32, ())}
    shape = (packing.rows,) if layer.is_hosts_int4 else (packing.rows, packing.groups)
    return {"weight_scale": (torch.float32, shape)}


def _factor_names(name):
    return f"{name}.weight_out", f"{name}.weight_in"


def write(path, sources, metadata):
    """Write a .safetensors file, one tensor after the other, so that no second copy of all of them is needed.

    sources: {key: (dtype, shape, get)}; get() returns the tensor, on any device. metadata: {str: str}. Raises ValueError for
    what `QuantizedFile` would not read.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape, _) in sources.items()}
    ordered = sorted(sources, key=lambda key: -math.gcd(sizes[key], 8))  # every tensor aligned; a layer's mostly side by side
    text = _header_bytes(ordered, sources, sizes, metadata)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            file.write(_bytes(key, *sources[key]))
        file.flush()
        os.fsync(file.fileno())


def _bytes(key, dtype, shape, get):
    """Return what get() gives, as bytes in memory of the CPU."""
    tensor = get()
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
        raise ValueError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, and was to be {dtype} {tuple(shape)}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header_bytes(keys, sources, sizes, metadata):
    header, at = {"__metadata__": metadata}, 0
    for key in keys:
        dtype, shape, _ = sources[key]
        if dtype not in NAMES or not NAME.fullmatch(key) or len(shape) > LARGEST_DIMENSIONS:
            raise ValueError(
                f"model: its weight {key} ({dtype}, {len(shape)} dimensions) cannot be kept in a file of this kind."
            )
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + sizes[key]]}
        at += sizes[key]
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > LARGEST_HEADER - 8:
        raise ValueError(f"model: it has too many layers for a file of this kind; their description has {len(text)} bytes.")
    return text + b" " * (-len(text) % 8)


class QuantizedFile:
    """An opened file: its header is checked, and nothing else of it is read yet. A context manager.

    about: its metadata, {"name": short name of the quantization, "activation": {"bits": 8 or 16, "per_tensor": bool},
    "dtype": of the network, "network": its class, "fingerprint": list of float}. settings: of the network, what its weights do
    not tell, {name: number, text, or list of such}. layers: {name: LayerFile}. plain: names of the tensors that are not
    quantized, and no scales.

    Raises ValueError, with a sentence, for a file that is damaged or that another program has written.
    """

    def __init__(self, path):
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"it cannot be opened ({reason(error)})") from error
        try:
            metadata, self._tensors, self._start = _read_tensors(self._file)
            self._check(_description(metadata))
            self.settings = _settings(metadata)
        except OSError as error:
            self.close()
            raise ValueError(f"it cannot be read ({reason(error)})") from error
        except ValueError:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Let go of the file."""
        self._file.close()

    def tensor(self, key):
        """Return a tensor of the file."""
        entry = self._tensors[key]
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        self._file.seek(self._start + entry.start)
        if self._file.readinto(data.numpy().data) != len(data):
            raise ValueError(f"it has become shorter; {key} is not whole")
        return data.view(entry.dtype).view(entry.shape)

    def packed(self, name):
        """Return the packed weight of a layer, int8 [nbytes]."""
        layer = self.layers[name]
        packing = Packing(layer.shape, layer.format)
        if layer.format.two_scales and not torch.equal(self.tensor(_codebook_name(name)), LEVELS):
            raise ValueError(f"{name} has other levels for its 4 bits than these nodes know")
        values = _hosts_nibbles(layer, self.tensor(f"{name}.weight").view(STORED[layer.format.kind]))
        scales = (self.tensor(f"{name}.{key}") for key in _scales_of(layer))
        scales = (scale if scale.ndim == 2 else scale.reshape(-1, 1) for scale in scales)
        factors = tuple(map(self.tensor, _factor_names(name))) if layer.format.rank else None
        return packing.pack((values, *scales), factors)

    def scales(self):
        """Return the ActivationScales in the file, None where there are none. Raises ValueError where they are damaged, or not
        of what is in the file.
        """
        if self._about_scales is None:
            return None
        tensors = {name: self.tensor(key) for name, key in _scale_keys().items() if key in self._tensors}
        tensors["fingerprint"] = torch.tensor(self.about["fingerprint"], dtype=torch.float32)
        try:
            scales = ActivationScales.of(tensors, self._about_scales)
        except ValueError as error:
            raise ValueError("its scales of activations are damaged") from error
        of_file = scales.facts["quantization"] == self.about["name"] and self.about["activation"]["bits"] == 8
        if not of_file or not set(scales.names) <= set(self.layers):
            raise ValueError("its scales of activations are not those of its layers")
        return scales

    def _check(self, about):
        try:
            _check_about(about)
            self.about = {name: about[name] for name in ("name", "activation", "dtype", "network", "fingerprint")}
            self.layers = {name: _layer(entry, about["version"]) for name, entry in about["layers"].items()}
            self._about_scales = about.get(SCALES_KEY) if about["version"] >= 4 else None
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"its description is damaged ({type(error).__name__}: {short(error)})") from error
        if not self.layers:
            raise ValueError("its description has no layer")
        wanted = {}
        for name, layer in self.layers.items():
            wanted |= _expected(name, layer, self.about["activation"]["bits"])
        for key, (dtype, shape) in wanted.items():
            self._check_tensor(key, dtype, shape)
        apart = set() if self._about_scales is None else set(_scale_keys().values())
        self.plain = [key for key in self._tensors if key not in wanted and key not in apart]

    def _check_tensor(self, key, dtype, shape):
        if key not in self._tensors:
            raise ValueError(f"{short(key)} is missing")
        found = self._tensors[key]
        if found.dtype != dtype:
            raise ValueError(f"{key} is {NAMES[found.dtype]}, and should be {NAMES[dtype]}")
        if found.shape != tuple(shape):
            raise ValueError(f"{key} has shape {found.shape}, and should have {tuple(shape)}")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file. start, stop: bytes, from where the data begin."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _read_tensors(file):
    """Return (metadata, {key: _Tensor}, where the data begin) of a file."""
    metadata, entries, start = read_header(file)
    tensors = {key: _tensor(key, entry) for key, entry in entries.items()}
    _check_places(tensors, os.fstat(file.fileno()).st_size - start)
    return metadata, tensors, start


def _tensor(key, entry):
    """Return the _Tensor of an entry in a header."""
    if not NAME.fullmatch(key):
        raise ValueError(f"it has a tensor of the name {short(key)}, which is no name of a weight")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short(key)} is not described by dtype, shape and data_offsets")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{short(key)} has a type that is not known ({short(dtype)})")
    if not _are_sizes(shape, LARGEST_DIMENSIONS) or not _are_sizes(places, 2) or len(places) != 2:
        raise ValueError(f"{short(key)} has a shape or a place that cannot be ({short(shape)}, {short(places)})")
    if places[1] - places[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{short(key)} has shape {tuple(shape)} and type {dtype}, and not the bytes {places} for it")
    return _Tensor(DTYPES[dtype], tuple(shape), *places)


def _are_sizes(values, most):
    """Tell whether a value is a list of so many whole numbers at most, none of them negative or larger than any file."""
    return (
        isinstance(values, list) and len(values) <= most and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _check_places(tensors, size):
    """Raise ValueError where the tensors do not fill so many bytes without gap or overlap."""
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise ValueError(f"{short(key)} does not begin where what is before it ends")
        end = tensor.stop
    if end != size:
        raise ValueError(f"it is truncated or has been added to (its tensors have {end} bytes, and it has {size} for them)")


def _description(metadata):
    """Return the description in a file's metadata."""
    if QUANTIZED_KEY not in metadata:
        raise ValueError("it was not written by Save Quantized Model (IEC); load it with the host's own node")
    about = parsed(metadata[QUANTIZED_KEY], "description")
    version = about.get("version") if isinstance(about, dict) else None
    if type(version) is not int or version not in VERSIONS:
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise ValueError(f"it is of version {short(version)}, and only versions {known} can be read; save the model anew")
    return about


def _settings(metadata):
    """Return the settings of a network in a file's metadata."""
    about = parsed(metadata.get(CONFIG_KEY, '{"transformer": {}}'), "settings of the network")
    settings = about.get("transformer") if isinstance(about, dict) else None
    lists = (
        [value if isinstance(value, list) else [value] for value in settings.values()] if isinstance(settings, dict) else [[{}]]
    )
    if not all(len(values) <= 64 and all(_is_setting(value) for value in values) for values in lists):
        raise ValueError(f"its settings of the network cannot be ({short(about)})")
    return settings


def _is_setting(value):
    if isinstance(value, (int, float)):
        return -(2**16) <= value <= 2**16  # no network is larger, and what is built by it stays bounded
    return value is None or (isinstance(value, str) and len(value) <= 200)


def _expected(name, layer, activation_bits):
    """Return {key: (dtype, shape)} of what a layer needs in the file."""
    packing, kind = Packing(layer.shape, layer.format), layer.format.kind
    row = -(-packing.inputs // 2) if kind == "int4" else packing.inputs
    return {
        f"{name}.weight": (_stored_dtype(layer), (packing.rows, row)),
        **{f"{name}.{key}": wanted for key, wanted in _scales_of(layer).items()},
        **({_codebook_name(name): (torch.float32, tuple(LEVELS.shape))} if layer.format.two_scales else {}),
        f"{name}.comfy_quant": (torch.uint8, (len(_description_bytes(layer, activation_bits)),)),
        **dict(zip(_factor_names(name), _expected_factors(packing))),
    }


def _expected_factors(packing):
    rank, dtype = packing.format.rank, FACTOR_DTYPES[packing.format.factors]
    return ((dtype, (packing.rows, rank)), (dtype, (rank, packing.inputs))) if rank else ()


def _layer(entry, version):
    """Return the LayerFile of an entry in a file's description. Raises ValueError or TypeError for what is none."""
    names = {one.name for one in fields(WeightFormat)} - _unknown_to(version)
    if set(entry) != {"shape", "format"} or set(entry["format"]) != names:
        raise ValueError(f"its description has a layer of other words than shape and format ({short(entry)})")
    shape, fmt = entry["shape"], WeightFormat(**entry["format"])
    whole = _are_sizes(shape, 4) and len(shape) in (2, 4) and 0 not in shape
    numbers = _are_sizes([fmt.group_size, fmt.rotation, fmt.rank], 3)
    switches = all(type(switch) is bool for switch in (fmt.search, fmt.calibrated, fmt.two_scales))
    switches = switches and (fmt.calibrated or not fmt.rank or version > 2)
    rotation = fmt.rotation if numbers else 0
    known = fmt.kind in LIMITS and fmt.factors in FACTOR_DTYPES
    if not (whole and numbers and switches and known) or (rotation and rotation_size(rotation) != rotation):
        raise ValueError(f"its description has a layer that cannot be ({short(entry)})")
    if Packing(shape, fmt).format != fmt:
        raise ValueError(f"its description has a layer whose format does not go with its shape ({short(entry)})")
    return LayerFile(tuple(shape), fmt, version)


def _check_about(about):
    """Raise ValueError, KeyError, TypeError or OverflowError where a description is none, but for its layers."""
    activation = about["activation"]
    known = set(activation) == {"bits", "per_tensor"} and type(activation["bits"]) is int and activation["bits"] in (8, 16)
    if not known or type(activation["per_tensor"]) is not bool:
        raise ValueError(f"its description has activations that cannot be ({short(activation)})")
    if not all(isinstance(about[key], str) and about[key].isprintable() for key in ("name", "dtype", "network")):
        raise ValueError("its description has a name that is no text")
    if about["dtype"] not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"its description has a type of network that cannot be ({short(about['dtype'])})")
    numbers = about["fingerprint"]
    whole = isinstance(numbers, list) and len(numbers) <= LARGEST_FINGERPRINT
    if not whole or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError("its fingerprint is damaged")


def _version(layers, scales):
    """Return the version of a file of such layers, a list of LayerFile, and of ActivationScales, which may be None."""
    formats = [layer.format for layer in layers]
    if scales is not None or any(layer.is_hosts_int4 or layer.format.two_scales for layer in layers):
        return 4
    if any(fmt.rank and not fmt.calibrated for fmt in formats):
        return 3
    return 2 if any(fmt.calibrated for fmt in formats) else 1


def _unknown_to(version):
    return (SINCE_VERSION_2 if version < 2 else set()) | (SINCE_VERSION_4 if version < 4 else set())


def _entry(layer, version):
    fmt = {name: value for name, value in asdict(layer.format).items() if name not in _unknown_to(version)}
    return {"shape": list(layer.shape), "format": fmt}


def _scale_keys():
    return {name: f"{SCALES}.{name}" for name in ("sigmas", "table")}


def scale_tensors(scales):
    """Return {key: tensor} of ActivationScales; of None, none."""
    tensors = {} if scales is None else scales.content()[0]
    return {key: tensors[name] for name, key in _scale_keys().items() if name in tensors}


def description(layers, name, activation, dtype, network, fingerprint, settings, scales=None):
    """Return the metadata of a file. layers: {name: LayerFile}. activation: dict. fingerprint: float32 [n]. settings: dict, of
    the network. scales: ActivationScales of its layers. Raises ValueError where they cannot be kept.
    """
    version = _version(layers.values(), scales)
    about = {
        "version": version, "name": name, "activation": activation, "dtype": dtype, "network": network,
        "fingerprint": fingerprint.tolist(),
        "layers": {key: _entry(layer, version) for key, layer in layers.items()},
        **({} if scales is None else {SCALES_KEY: scales.content()[1]}),
    }  # fmt: skip
    hosts = {key: host_description(layer, activation["bits"]) for key, layer in layers.items()}
    try:
        config = {CONFIG_KEY: json.dumps({"transformer": settings})} if settings else {}
        _settings(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: it cannot be saved, for {error}.") from error
    return config | {
        QUANTIZED_KEY: json.dumps(about, separators=(",", ":")),
        HOST_KEY: json.dumps({"format_version": "1.0", "layers": hosts}, separators=(",", ":")),
    }
