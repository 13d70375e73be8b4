"""Measure how long each way to compute a quantized layer takes on a GPU, and keep the times in a small file.

Times are measured at first use. Which way is fastest depends on the card, the layer and the size of its input; no simple rule
predicts it. The file has the times of each card, with the versions of its driver and of all libraries and kernels used. After
a change of any version, times are measured again.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from ..devices import is_out_of_memory
from ..errors import FileError
from ..log import logger
from . import int8

FORMAT = "iec kernel times 1"
ROUNDS = 5  # rounds per way, alternating with the other ways
ROUND_SECONDS, MOST_CALLS = 3e-4, 20  # target duration of a round, and its largest number of calls
SIGNIFICANT_BITS = 3  # of a number of rows; numbers that share their times differ by less than a quarter
PAUSE = 60  # seconds without timing after it ran out of memory

Ways = Mapping[str, Callable[[], object]]  # {name of a way: function without arguments that computes the layer}
Cards = dict[str, dict[str, dict[str, dict[str, float]]]]  # {card: {layer: {rows: {way: microseconds}}}}


class CudaClock:
    """Measure times on CUDA devices (or ROCm's) by events of the device."""

    def covers(self, device: torch.device) -> bool:
        """Return whether times can be measured on a device."""
        return device.type == "cuda"

    def is_free(self) -> bool:
        """Return whether times can be measured now. During the capture of a CUDA graph, waiting would end the capture."""
        return not torch.cuda.is_current_stream_capturing()

    def card(self, device: torch.device) -> str:
        """Return a text that names everything on which times on a device depend."""
        return _card(device)

    def times(self, ways: Ways, device: torch.device, rounds: int = ROUNDS) -> dict[str, float]:
        """Return {name: microseconds per call} of the ways, each the median of `rounds` rounds.

        The calls of a round follow each other without waiting, as in a network. So if Python is slower than the GPU, Python's
        time is measured.
        """
        with torch.cuda.device(device):
            for way in ways.values():
                way()  # the first call allocates memory
            calls = {name: _calls(self._seconds(way, 1)) for name, way in ways.items()}
            seconds = [{name: self._seconds(way, calls[name]) for name, way in ways.items()} for _ in range(rounds)]
        return {name: 1e6 * statistics.median(one[name] for one in seconds) / calls[name] for name in ways}

    @staticmethod
    def _seconds(way: Callable[[], object], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            way()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _calls(seconds: float) -> int:
    return min(max(round(ROUND_SECONDS / max(seconds, 1e-9)), 1), MOST_CALLS)


class KernelTimes:
    """The measured times. path: a function that returns the file's path. clock: a CudaClock, or an object with its methods."""

    def __init__(self, path: Callable[[], str | os.PathLike[str]], clock: CudaClock | None = None) -> None:
        self._path, self._clock = path, clock or CudaClock()
        self._cards: Cards | None = None  # read from the file at first use
        # {(card, layer, rows): {way: math.inf}}, for this process only
        self._failed: dict[tuple[str, str, str], dict[str, float]] = {}
        self._pause_until, self._lock = 0.0, threading.Lock()

    def covers(self, device: torch.device) -> bool:
        """Return whether times are measured on a device."""
        return self._clock.covers(device)

    def known(self, device: torch.device, layer: str, rows: int, names: Collection[str]) -> dict[str, float]:
        """Return {name: microseconds} of the ways with these names for a number of rows; {} if not all of them were measured.
        layer: the kind of layer, as text. A way that raised an error has the time math.inf.
        """
        return self._known(device, layer, str(rounded(rows)), names) if self._clock.covers(device) else {}

    def known_of_most(self, device: torch.device, layer: str, names: Collection[str]) -> dict[str, float]:
        """Return the same as `known`, for the largest number of rows at which all these ways were measured."""
        if not self._clock.covers(device):
            return {}
        sizes = sorted(self._layers(device).get(layer, {}), key=int, reverse=True)
        return next((times for size in sizes if (times := self._known(device, layer, size, names))), {})

    def of(self, device: torch.device, layer: str, rows: int, ways: Ways) -> dict[str, float]:
        """Return the same as `known` for ways, and measure their times first if they are not known. Return {} if times cannot
        be measured now, memory is short, or the first way raises an error.

        The first way must be one that fails only if its inputs are wrong. If it fails, nothing is recorded about the other
        ways. If it works, other ways that fail are logged, and this process does not try them again for this size.
        """
        if times := self.known(device, layer, rows, ways):
            return times
        if not self._clock.covers(device) or not self._clock.is_free() or time.monotonic() < self._pause_until:
            return {}
        card, size = self._clock.card(device), str(rounded(rows))
        try:
            times = self._measured(device, layer, ways, self._failed.setdefault((card, layer, size), {}))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._pause_until = time.monotonic() + PAUSE
            return {}
        if times:
            self._keep(card, layer, size, times)
        return self.known(device, layer, rows, ways)

    @torch.no_grad()
    def _measured(self, device: torch.device, layer: str, ways: Ways, failed: dict[str, float]) -> dict[str, float]:
        """Return the times of the ways that work, and add the others to `failed`. Return {} if the first does not work."""
        first = next(iter(ways))
        for name, way in ways.items():
            try:
                name in failed or way()  # the first call compiles kernels
            except Exception as error:  # any class: compilers and drivers have their own errors
                if is_out_of_memory(error):
                    raise
                if name == first:
                    return {}
                failed[name] = math.inf
                why = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
                logger.warning(f"{name} cannot compute a layer of the kind '{layer}': {why}.")
        return self._clock.times({name: way for name, way in ways.items() if name not in failed}, device)

    def _known(self, device: torch.device, layer: str, size: str, names: Collection[str]) -> dict[str, float]:
        failed = self._failed.get((self._clock.card(device), layer, size), {})
        times = failed | self._layers(device).get(layer, {}).get(size, {})
        return {name: times[name] for name in names} if all(name in times for name in names) else {}

    def _layers(self, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
        with self._lock:
            if self._cards is None:
                self._cards = _read(self._path())
            return self._cards.setdefault(self._clock.card(device), {})

    def _keep(self, card: str, layer: str, size: str, times: dict[str, float]) -> None:
        """Keep new times, and add them to those in the file, which other processes may have changed. A file of another format
        stays unchanged. If the file cannot be written, times are measured again after the next start.
        """
        path = os.path.realpath(self._path())  # a link stays a link
        half = f"{path}.{uuid.uuid4().hex}.part"
        assert self._cards is not None  # `known` has read them
        with self._lock, contextlib.suppress(OSError, ValueError):
            _put(self._cards, card, layer, size, times)
            cards = _parsed(path) if os.path.lexists(path) else {}
            _put(cards, card, layer, size, times)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                text = json.dumps({"format": FORMAT, "microseconds": cards}, indent=1)
                pathlib.Path(half).write_text(text, encoding="utf-8")
                os.replace(half, path)
            finally:
                with contextlib.suppress(OSError):
                    os.remove(half)


def _put(cards: Cards, card: str, layer: str, size: str, times: dict[str, float]) -> None:
    cards.setdefault(card, {}).setdefault(layer, {}).setdefault(size, {}).update(times)


def rounded(rows: int) -> int:
    """Return a number of rows rounded down to SIGNIFICANT_BITS; numbers with the same result share their times."""
    spare = max(rows.bit_length() - SIGNIFICANT_BITS, 0)
    return rows >> spare << spare


@functools.cache
def _card(device: torch.device) -> str:
    """Return the name of a CUDA device, the versions of all that computes there, and settings that the host's options
    change.
    """
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    matmul = torch.backends.cuda.matmul
    settings = {
        "fp16 accumulation": getattr(matmul, "allow_fp16_accumulation", False), "TF32": matmul.allow_tf32,
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
    }  # fmt: skip
    return ", ".join([
        torch.cuda.get_device_name(device), f"driver {driver}", f"torch {torch.__version__}",
        f"cuDNN {torch.backends.cudnn.version()}", f"Triton {_version('triton')}",
        f"comfy-kitchen {_version('comfy-kitchen')} ({' '.join(int8.kitchen_backends()) or 'without kernels'})",
        f"kernels {_fingerprint()}", *(name for name, is_on in settings.items() if is_on),
    ])  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _fingerprint() -> str:
    """Return a hash of the source of this pack's kernels."""
    folder = pathlib.Path(__file__).parent
    files = [*folder.glob("kernels/*.py"), folder / "int8.py", folder / "fp8.py", folder / "packing.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:8]


def _read(path: str | os.PathLike[str]) -> Cards:
    """Return the times in a file; {} if there is no file. A file that cannot be used gives {} too, and a warning."""
    try:
        return _parsed(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        logger.warning(f"{os.path.basename(path)} in the folder of the profiles is not used and not changed: {why}.")
        return {}


def _parsed(path: str | os.PathLike[str]) -> Cards:
    """Return the times in a file. Raises FileError or another ValueError if it is not a file of kernel times, and OSError if it
    cannot be read.
    """
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileError("it is not a file of kernel times")
    cards: Any = found.get("microseconds")
    if not _is_nested(cards, _is_of_layer):
        raise FileError("its content is not that of a file of kernel times")
    return cards


def _is_of_layer(layers: object) -> bool:
    return _is_nested(layers, lambda sizes: _is_nested(sizes, _is_of_size) and all(map(str.isdecimal, sizes)))


def _is_of_size(times: object) -> bool:
    return _is_nested(times, lambda one: type(one) in (int, float) and 0 < one < math.inf)


def _is_nested(value: object, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(holds, value.values()))
