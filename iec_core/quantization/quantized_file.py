"""Quantized models as .safetensors files.

The host is ComfyUI, version 0.33 or later. Shapes in this file: O output channels, K inputs, G groups per output channel, r the
rank of the low-rank branch, S timesteps, L layers.

A quantized layer has three tensors with ComfyUI's names: `<layer>.weight`, its integers or float8 numbers [O, K], int4 with two
numbers per byte; `<layer>.weight_scale`; and `<layer>.comfy_quant`, its description (JSON in bytes). The descriptions are also
in the header's metadata, where older hosts look for them. A layer with a low-rank branch also has its factors,
`<layer>.weight_out` [O, r] and `<layer>.weight_in` [r, K]. A layer with two scales (two_scales.py) has `.weight_s_channel`
[O], the shares `.weight_s_rel` [O, G] and the levels `.weight_codebook` [16] instead of `.weight_scale`.

The host can load some layers without this pack. These are Linear layers without a branch, in one of these formats: int8 with
one scale per channel, rotated or not; float8, not rotated; int4 with one scale per channel, rotated in blocks of 64 or 256;
int4 with two scales, rotated in blocks of 256. All other layers have format names that the host does not know, and the weights
of convolutions have shapes that its layers do not have. So the host fails instead of misreading them.

Information for this pack alone is in the metadata, under the key `iec.quantized`. Calibrated scales of activations are two more
tensors, `iec.activation_scales.table` [S, L] and `iec.activation_scales.sigmas` [S].

The header of a file is checked before anything is allocated. Then tensors are read one at a time, each into its own memory. So
the file does not stay mapped, and no more memory is allocated than the file's size.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, BinaryIO, TypedDict, cast

import torch

from ..errors import FileError, ModelError
from ..file_kinds import QUANTIZED_KEY
from ..safetensors_header import LARGEST_HEADER, parsed, read_header, reason, short
from .activation_scales import ActivationScales
from .packing import FACTOR_DTYPES, LIMITS, Packing, WeightFormat, rotation_size
from .two_scales import LEVELS

# A file has the lowest version that can describe it. Version 2 added calibrated layers. Version 3 added layers with a branch
# that are not calibrated. Version 4 added scales of activations, groups of two scales, and int4 layers in the host's format.
VERSIONS = 1, 2, 3, 4
HOST_KEY = "_quantization_metadata"  # ComfyUI's key
CONFIG_KEY = "config"  # ComfyUI's key: {"transformer": settings of the network that its weights do not show}
HOST_FORMATS = {"int8": "int8_tensorwise", "fp8": "float8_e4m3fn", "int4": "convrot_w4a4"}
HOST_TWO_SCALES = "asym_w4a8_int8"
# Block sizes of rotations for which the host has kernels, and can quantize a weight again after a LoRA.
HOST_ROTATIONS = {"convrot_w4a4": (64, 256), HOST_TWO_SCALES: (256,)}
SCALES_KEY = "activation_scales"  # the description's key for the metadata of the activation scales
SCALES = "iec.activation_scales"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINCE_VERSION_2, SINCE_VERSION_4 = {"calibrated", "rank", "factors"}, {"two_scales"}  # fields of WeightFormat
STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

LARGEST_DIMENSIONS = 8  # of a tensor
LARGEST_FINGERPRINT = 4096  # numbers

TensorType = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape
Source = tuple[torch.dtype, Sequence[int], Callable[[], torch.Tensor]]  # dtype, shape and a function that returns the tensor


class Activation(TypedDict):
    """The activations of the quantized layers. bits: 8 or 16. per_tensor: whether a scale is for a whole tensor."""

    bits: int
    per_tensor: bool


class About(TypedDict):
    """The description of a quantized network in a file. name: short name of the quantization. dtype: name of the network's
    dtype, such as "float16". network: name of its class.
    """

    name: str
    activation: Activation
    dtype: str
    network: str
    fingerprint: list[float]


@dataclass(frozen=True)
class LayerFile:
    """A layer's description in a file. shape: of its weight. format: a WeightFormat. version: of the file."""

    shape: tuple[int, ...]
    format: WeightFormat
    version: int = field(default=VERSIONS[-1], compare=False)

    @property
    def is_hosts(self) -> bool:
        """Whether the layer is written in a format of the host."""
        fmt = self.format
        if len(self.shape) != 2 or (fmt.group_size and not fmt.two_scales) or fmt.rank:
            return False
        if fmt.kind == "int4":
            return fmt.rotation in HOST_ROTATIONS[self._hosts_like] and self.version >= 4
        return fmt.kind == "int8" or not fmt.rotation  # the host does not rotate float8

    @property
    def is_hosts_int4(self) -> bool:
        """Whether the layer is written in the host's int4 format: bytes are int8, and scales have one dimension."""
        return self.is_hosts and self.format.kind == "int4"

    @property
    def host_format(self) -> str:
        """The format name that the host reads; the host knows no name with the prefix "iec_"."""
        return self._hosts_like if self.is_hosts else f"iec_{self.format.kind}"

    @property
    def _hosts_like(self) -> str:
        return HOST_TWO_SCALES if self.format.two_scales else HOST_FORMATS[self.format.kind]


def host_description(layer: LayerFile, activation_bits: int) -> dict[str, str | int]:
    """Return the description that the host reads for a layer."""
    about: dict[str, str | int] = {"format": layer.host_format}
    if activation_bits == 16:
        about["full_precision_matrix_mult"] = True
    if layer.is_hosts_int4:
        # Without groups, the host would round activations to 4 bits by default.
        two_scales = layer.format.two_scales
        more: dict[str, str | int] = {"group_size": layer.format.group_size} if two_scales else {"linear_dtype": "int8"}
        return about | {"convrot_groupsize": layer.format.rotation} | more
    if layer.format.rotation:
        about |= {"convrot": True, "convrot_groupsize": layer.format.rotation}
    return about


def _description_bytes(layer: LayerFile, activation_bits: int) -> bytes:
    text = json.dumps(host_description(layer, activation_bits)).encode()
    return text + b" " * (-len(text) % 8)  # so that the next tensor stays aligned


def layer_tensors(name: str, layer: LayerFile, packed: torch.Tensor, activation_bits: int) -> dict[str, torch.Tensor]:
    """Return {key: tensor} of a layer as a file has them. packed: its packed weight, int8 [nbytes]."""
    packing = Packing(layer.shape, layer.format)
    values, *scales = packing.stored(packed)
    return {
        f"{name}.weight": _hosts_nibbles(layer, values).view(_stored_dtype(layer)),
        **{f"{name}.{key}": _in_shape(scale, shape) for (key, (_, shape)), scale in zip(_scales_of(layer).items(), scales)},
        **({_codebook_name(name): LEVELS.clone()} if layer.format.two_scales else {}),
        f"{name}.comfy_quant": torch.tensor(list(_description_bytes(layer, activation_bits)), dtype=torch.uint8),
        **dict(zip(_factor_names(name), packing.factors(packed) or ())),
    }


def _codebook_name(name: str) -> str:
    return f"{name}.weight_codebook"


def _in_shape(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return as many of the first scales as this shape holds, in this shape.

    A float8 layer has the same scale in all rows, and the file stores one.
    """
    return scale.flatten()[: math.prod(shape)].view(shape)


def _stored_dtype(layer: LayerFile) -> torch.dtype:
    return torch.int8 if layer.is_hosts_int4 else STORED[layer.format.kind]


def _hosts_nibbles(layer: LayerFile, values: torch.Tensor) -> torch.Tensor:
    """Convert stored values from a Packing's form to the file's form, or back. The host adds 8 to each int4 of a layer with two
    scales; all other values are the same in both.
    """
    return values ^ 0x88 if layer.host_format == HOST_TWO_SCALES else values


def _scales_of(layer: LayerFile) -> dict[str, TensorType]:
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


def _factor_names(name: str) -> tuple[str, str]:
    return f"{name}.weight_out", f"{name}.weight_in"


def write(path: str | os.PathLike[str], sources: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file, one tensor after the other, so that there is never a second copy of all tensors.

    sources: {key: (dtype, shape, get)}; get() returns the tensor, on any device. metadata: {str: str}. Raises ModelError for
    tensors that `QuantizedFile` would not read, and OSError if the file cannot be written.
    """
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (dtype, shape, _) in sources.items()}
    # Every tensor is aligned, and the tensors of a layer are mostly adjacent.
    ordered = sorted(sources, key=lambda key: -math.gcd(sizes[key], 8))
    text = _header_bytes(ordered, sources, sizes, metadata)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            file.write(_bytes(key, *sources[key]))
        file.flush()
        os.fsync(file.fileno())


def _bytes(key: str, dtype: torch.dtype, shape: Sequence[int], get: Callable[[], torch.Tensor]) -> memoryview:
    """Return the bytes of the tensor get(), in CPU memory."""
    tensor = get()
    if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
        raise ModelError(f"{key} is {tensor.dtype} {tuple(tensor.shape)}, but should be {dtype} {tuple(shape)}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header_bytes(keys: list[str], sources: Mapping[str, Source], sizes: dict[str, int], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for key in keys:
        dtype, shape, _ = sources[key]
        if dtype not in NAMES or not NAME.fullmatch(key) or len(shape) > LARGEST_DIMENSIONS:
            raise ModelError(
                f"model: its weight {key} ({dtype}, {len(shape)} dimensions) cannot be stored in a file of this kind."
            )
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + sizes[key]]}
        at += sizes[key]
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > LARGEST_HEADER - 8:
        raise ModelError(f"model: it has too many layers for a file of this kind; their description has {len(text)} bytes.")
    return text + b" " * (-len(text) % 8)


class QuantizedFile:
    """An opened file, whose header has been checked; tensors are read later. It is a context manager.

    about: the description of the quantized network, an About. settings: settings of the network that its weights do not show,
    {name: number, text, None, or list of these}. layers: {name: LayerFile}. plain: keys of the other tensors, which belong to
    no quantized layer and are not scales of activations.

    Raises FileError for a file that cannot be read, is damaged, or was written by another program. The message says why.
    """

    about: About
    layers: dict[str, LayerFile]
    plain: list[str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise FileError(f"it cannot be opened ({reason(error)})") from error
        try:
            metadata, self._tensors, self._start = _read_tensors(self._file)
            self._check(_description(metadata))
            self.settings = _settings(metadata)
        except OSError as error:
            self.close()
            raise FileError(f"it cannot be read ({reason(error)})") from error
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> "QuantizedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def tensor(self, key: str) -> torch.Tensor:
        """Read a tensor of the file. Raises FileError if the file has become shorter."""
        entry = self._tensors[key]
        data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        self._file.seek(self._start + entry.start)
        if self._file.readinto(data.numpy().data) != len(data):
            raise FileError(f"it has become shorter; {key} is incomplete")
        return data.view(entry.dtype).view(entry.shape)

    def packed(self, name: str) -> torch.Tensor:
        """Read the packed weight of a layer, int8 [nbytes]. Raises FileError if the file has become shorter, or has other
        levels for two scales.
        """
        layer = self.layers[name]
        packing = Packing(layer.shape, layer.format)
        if layer.format.two_scales and not torch.equal(self.tensor(_codebook_name(name)), LEVELS):
            raise FileError(f"{name} has levels for its 4 bits that these nodes do not know")
        values = _hosts_nibbles(layer, self.tensor(f"{name}.weight").view(STORED[layer.format.kind]))
        scales = (self.tensor(f"{name}.{key}") for key in _scales_of(layer))
        scales = (scale if scale.ndim == 2 else scale.reshape(-1, 1) for scale in scales)
        out, into = _factor_names(name)
        factors = (self.tensor(out), self.tensor(into)) if layer.format.rank else None
        return packing.pack((values, *scales), factors)

    def scales(self) -> ActivationScales | None:
        """Read the ActivationScales in the file; None if there are none. Raises FileError if they are damaged, or were
        calibrated for another quantization or other layers.
        """
        if self._about_scales is None:
            return None
        tensors = {name: self.tensor(key) for name, key in _scale_keys().items() if key in self._tensors}
        tensors["fingerprint"] = torch.tensor(self.about["fingerprint"], dtype=torch.float32)
        try:
            scales = ActivationScales.of(tensors, self._about_scales)
        except FileError as error:
            raise FileError("its scales of activations are damaged") from error
        of_file = scales.facts["quantization"] == self.about["name"] and self.about["activation"]["bits"] == 8
        if not of_file or not set(scales.names) <= set(self.layers):
            raise FileError("its scales of activations are not those of its layers")
        return scales

    def _check(self, about: dict[str, Any]) -> None:
        try:
            _check_about(about)
            self.about = cast(About, {name: about[name] for name in ("name", "activation", "dtype", "network", "fingerprint")})
            self.layers = {name: _layer(entry, about["version"]) for name, entry in about["layers"].items()}
            self._about_scales = about.get(SCALES_KEY) if about["version"] >= 4 else None
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise FileError(f"its description is damaged ({type(error).__name__}: {short(error)})") from error
        if not self.layers:
            raise FileError("its description has no layer")
        wanted: dict[str, TensorType] = {}
        for name, layer in self.layers.items():
            wanted |= _expected(name, layer, self.about["activation"]["bits"])
        for key, (dtype, shape) in wanted.items():
            self._check_tensor(key, dtype, shape)
        apart = set() if self._about_scales is None else set(_scale_keys().values())
        self.plain = [key for key in self._tensors if key not in wanted and key not in apart]

    def _check_tensor(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if key not in self._tensors:
            raise FileError(f"{short(key)} is missing")
        found = self._tensors[key]
        if found.dtype != dtype:
            raise FileError(f"{key} is {NAMES[found.dtype]}, but should be {NAMES[dtype]}")
        if found.shape != tuple(shape):
            raise FileError(f"{key} has shape {found.shape}, but should have {tuple(shape)}")


@dataclass(frozen=True)
class _Tensor:
    """A tensor's entry in a header. start, stop: its place in bytes, relative to the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _read_tensors(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Tensor], int]:
    """Return (metadata, {key: _Tensor}, start of the data in bytes) of a file."""
    metadata, entries, start = read_header(file)
    tensors = {key: _tensor(key, entry) for key, entry in entries.items()}
    _check_places(tensors, os.fstat(file.fileno()).st_size - start)
    return metadata, tensors, start


def _tensor(key: str, entry: object) -> _Tensor:
    """Return the _Tensor of an entry in a header. Raises FileError if the entry is damaged."""
    if not NAME.fullmatch(key):
        raise FileError(f"it has a tensor named {short(key)}, which is not a name of a weight")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{short(key)} is not described by dtype, shape and data_offsets")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{short(key)} has an unknown type ({short(dtype)})")
    if not _are_sizes(shape, LARGEST_DIMENSIONS) or not _are_sizes(places, 2) or len(places) != 2:
        raise FileError(f"{short(key)} has an invalid shape or place ({short(shape)}, {short(places)})")
    if places[1] - places[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise FileError(f"{short(key)} has shape {tuple(shape)} and type {dtype}, which do not match its bytes {places}")
    return _Tensor(DTYPES[dtype], tuple(shape), *places)


def _are_sizes(values: object, most: int) -> bool:
    """Return whether a value is a list of at most `most` integers, none of them negative or larger than any file."""
    return (
        isinstance(values, list) and len(values) <= most and all(type(value) is int and 0 <= value < 2**62 for value in values)
    )


def _check_places(tensors: dict[str, _Tensor], size: int) -> None:
    """Raise FileError if the tensors do not fill `size` bytes without gaps and overlaps."""
    end = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise FileError(f"{short(key)} has a gap or an overlap before it")
        end = tensor.stop
    if end != size:
        raise FileError(f"it is truncated or too long (its tensors take {end} bytes, but it has {size} bytes for them)")


def _description(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the description in a file's metadata. Raises FileError if it has none, or one of an unknown version."""
    if QUANTIZED_KEY not in metadata:
        raise FileError("it was not written by Save Quantized Model (IEC); load it with ComfyUI's own node")
    about = parsed(metadata[QUANTIZED_KEY], "description")
    version = about.get("version") if isinstance(about, dict) else None
    if type(version) is not int or version not in VERSIONS:
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        raise FileError(f"it is of version {short(version)}, but only versions {known} can be read; save the model again")
    return about


def _settings(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the settings of a network in a file's metadata. Raises FileError if they are damaged or too large."""
    about = parsed(metadata.get(CONFIG_KEY, '{"transformer": {}}'), "settings of the network")
    settings = about.get("transformer") if isinstance(about, dict) else None
    if not isinstance(settings, dict) or not all(map(_is_setting_or_list, settings.values())):
        raise FileError(f"its settings of the network are invalid ({short(about)})")
    return settings


def _is_setting_or_list(value: object) -> bool:
    return len(value) <= 64 and all(map(_is_setting, value)) if isinstance(value, list) else _is_setting(value)


def _is_setting(value: object) -> bool:
    if isinstance(value, (int, float)):
        return -(2**16) <= value <= 2**16  # no network has larger ones, and the size of the network stays bounded
    return value is None or (isinstance(value, str) and len(value) <= 200)


def _expected(name: str, layer: LayerFile, activation_bits: int) -> dict[str, TensorType]:
    """Return {key: (dtype, shape)} of the tensors that a layer must have in the file."""
    packing, kind = Packing(layer.shape, layer.format), layer.format.kind
    row = -(-packing.inputs // 2) if kind == "int4" else packing.inputs
    return {
        f"{name}.weight": (_stored_dtype(layer), (packing.rows, row)),
        **{f"{name}.{key}": wanted for key, wanted in _scales_of(layer).items()},
        **({_codebook_name(name): (torch.float32, tuple(LEVELS.shape))} if layer.format.two_scales else {}),
        f"{name}.comfy_quant": (torch.uint8, (len(_description_bytes(layer, activation_bits)),)),
        **dict(zip(_factor_names(name), _expected_factors(packing))),
    }


def _expected_factors(packing: Packing) -> tuple[TensorType, ...]:
    rank, dtype = packing.format.rank, FACTOR_DTYPES[packing.format.factors]
    return ((dtype, (packing.rows, rank)), (dtype, (rank, packing.inputs))) if rank else ()


def _layer(entry: Any, version: int) -> LayerFile:
    """Return the LayerFile of an entry in a file's description. Raises FileError, KeyError or TypeError if the entry is
    damaged.
    """
    names = {one.name for one in fields(WeightFormat)} - _unknown_to(version)
    if set(entry) != {"shape", "format"} or set(entry["format"]) != names:
        raise FileError(f"its description has a layer with other entries than shape and format ({short(entry)})")
    shape, fmt = entry["shape"], WeightFormat(**entry["format"])
    whole = _are_sizes(shape, 4) and len(shape) in (2, 4) and 0 not in shape
    numbers = _are_sizes([fmt.group_size, fmt.rotation, fmt.rank], 3)
    switches = all(type(switch) is bool for switch in (fmt.search, fmt.calibrated, fmt.two_scales))
    switches = switches and (fmt.calibrated or not fmt.rank or version > 2)
    rotation = fmt.rotation if numbers else 0
    known = fmt.kind in LIMITS and fmt.factors in FACTOR_DTYPES
    if not (whole and numbers and switches and known) or (rotation and rotation_size(rotation) != rotation):
        raise FileError(f"its description has an invalid layer ({short(entry)})")
    if Packing(shape, fmt).format != fmt:
        raise FileError(f"its description has a layer whose format does not fit its shape ({short(entry)})")
    return LayerFile(tuple(shape), fmt, version)


def _check_about(about: dict[str, Any]) -> None:
    """Raise FileError, KeyError, TypeError or OverflowError if a description is damaged. Its layers are not checked here."""
    activation = about["activation"]
    known = set(activation) == {"bits", "per_tensor"} and type(activation["bits"]) is int and activation["bits"] in (8, 16)
    if not known or type(activation["per_tensor"]) is not bool:
        raise FileError(f"its description has invalid activations ({short(activation)})")
    if not all(isinstance(about[key], str) and about[key].isprintable() for key in ("name", "dtype", "network")):
        raise FileError("its description has a name that is not text")
    if about["dtype"] not in ("float32", "float16", "bfloat16"):
        raise FileError(f"its description has an invalid type of network ({short(about['dtype'])})")
    numbers = about["fingerprint"]
    whole = isinstance(numbers, list) and len(numbers) <= LARGEST_FINGERPRINT
    if not whole or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise FileError("its fingerprint is damaged")


def _version(layers: Sequence[LayerFile], scales: ActivationScales | None) -> int:
    """Return the lowest version of a file that can describe the layers and the scales."""
    formats = [layer.format for layer in layers]
    if scales is not None or any(layer.is_hosts_int4 or layer.format.two_scales for layer in layers):
        return 4
    if any(fmt.rank and not fmt.calibrated for fmt in formats):
        return 3
    return 2 if any(fmt.calibrated for fmt in formats) else 1


def _unknown_to(version: int) -> set[str]:
    return (SINCE_VERSION_2 if version < 2 else set()) | (SINCE_VERSION_4 if version < 4 else set())


def _entry(layer: LayerFile, version: int) -> dict[str, object]:
    fmt = {name: value for name, value in asdict(layer.format).items() if name not in _unknown_to(version)}
    return {"shape": list(layer.shape), "format": fmt}


def _scale_keys() -> dict[str, str]:
    return {name: f"{SCALES}.{name}" for name in ("sigmas", "table")}


def scale_tensors(scales: ActivationScales | None) -> dict[str, torch.Tensor]:
    """Return {key: tensor} of ActivationScales as a file has them; {} for None."""
    tensors = {} if scales is None else scales.content()[0]
    return {key: tensors[name] for name, key in _scale_keys().items() if name in tensors}


def description(
    layers: Mapping[str, LayerFile],
    name: str,
    activation: Activation,
    dtype: str,
    network: str,
    fingerprint: torch.Tensor,
    settings: Mapping[str, object],
    scales: ActivationScales | None = None,
) -> dict[str, str]:
    """Return the metadata of a file. layers: {name: LayerFile}. name, activation, dtype, network: as in About. fingerprint:
    float32 [n]. settings: of the network. scales: ActivationScales of its layers. Raises ModelError if the settings cannot be
    saved.
    """
    version = _version([*layers.values()], scales)
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
        raise ModelError(f"model: it cannot be saved, because {error}.") from error
    return config | {
        QUANTIZED_KEY: json.dumps(about, separators=(",", ":")),
        HOST_KEY: json.dumps({"format_version": "1.0", "layers": hosts}, separators=(",", ":")),
    }
