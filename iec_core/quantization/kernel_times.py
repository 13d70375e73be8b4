"""How long the ways to compute a quantized layer take on a GPU: timed at first use, and kept in a small file.

Which way is the fastest is a matter of the card, the layer and the size of what comes in; no rule knows it. The file has the
times of every card, by its driver and by all that computes there: with another one, they are taken anew.
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

import torch

from ..devices import is_out_of_memory
from ..log import logger
from . import int8

FORMAT = "iec kernel times 1"
ROUNDS, ROUND_SECONDS, MOST_CALLS = 5, 3e-4, 20  # of a way, in turn with the others; how long one lasts; its most calls
SIGNIFICANT_BITS = 3  # of a number of rows: those that share their times differ by less than a quarter
PAUSE = 60  # seconds without timing after memory was too short for it


class CudaClock:
    """Times on CUDA devices (or ROCm's), by their events."""

    def covers(self, device):
        """Tell whether a torch.device is one that can be timed."""
        return device.type == "cuda"

    def is_free(self):
        """Tell whether it can be timed now: not while a graph of a device's work is taken, which a wait would end."""
        return not torch.cuda.is_current_stream_capturing()

    def card(self, device):
        """Return in words what times on a device depend on."""
        return _card(device)

    def times(self, ways, device, rounds=ROUNDS):
        """Return {name: microseconds a call} of ways={name: function}: medians of so many rounds in turn.

        The calls of a round follow each other without a wait, as in a network: where Python is slower than the GPU, its time
        counts.
        """
        with torch.cuda.device(device):
            for way in ways.values():
                way()  # allocates
            calls = {name: _calls(self._seconds(way, 1)) for name, way in ways.items()}
            seconds = [{name: self._seconds(way, calls[name]) for name, way in ways.items()} for _ in range(rounds)]
        return {name: 1e6 * statistics.median(one[name] for one in seconds) / calls[name] for name in ways}

    @staticmethod
    def _seconds(way, calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            way()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _calls(seconds):
    return min(max(round(ROUND_SECONDS / max(seconds, 1e-9)), 1), MOST_CALLS)


class KernelTimes:
    """What was timed. path: a function that returns where the file is. clock: a CudaClock, or what has its methods."""

    def __init__(self, path, clock=None):
        self._path, self._clock = path, clock or CudaClock()
        self._cards = None  # {card: {layer: {rows: {way: microseconds}}}}, read at first use
        self._failed = {}  # {(card, layer, rows): {way: math.inf}}, of this process alone
        self._pause_until, self._lock = 0.0, threading.Lock()

    def covers(self, device):
        """Tell whether a torch.device is one that is timed."""
        return self._clock.covers(device)

    def known(self, device, layer, rows, names):
        """Return {name: microseconds} of the ways of these names to compute a layer for so many rows, {} where not all of them
        were timed. layer: what kind it is, in words. A way that ended in an error takes math.inf.
        """
        return self._known(device, layer, str(rounded(rows)), names) if self._clock.covers(device) else {}

    def known_of_most(self, device, layer, names):
        """Return what `known` does, for the most rows that all of the names were timed for."""
        if not self._clock.covers(device):
            return {}
        sizes = sorted(self._layers(device).get(layer, {}), key=int, reverse=True)
        return next((times for size in sizes if (times := self._known(device, layer, size, names))), {})

    def of(self, device, layer, rows, ways):
        """Return what `known` does of ways={name: function without arguments}, which are timed where they were not. {}: where
        that cannot be done now, memory is short, or the first way ends in an error.

        The first way is one that can only fail where what comes in is wrong: then nothing is found out about the others, which
        else are logged as failing, and not tried again for such a size by this process.
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
    def _measured(self, device, layer, ways, failed):
        """Time the ways that work; take up the others in `failed`. {} where the first does not work."""
        first = next(iter(ways))
        for name, way in ways.items():
            try:
                name in failed or way()  # compiles what it needs
            except Exception as error:  # of any kind: compilers and drivers have their own
                if is_out_of_memory(error):
                    raise
                if name == first:
                    return {}
                failed[name] = math.inf
                why = f"{type(error).__name__}: {str(error).strip() or 'without a word'}".splitlines()[0]
                logger.warning(f"{name} does not compute a layer of the kind '{layer}': {why}.")
        return self._clock.times({name: way for name, way in ways.items() if name not in failed}, device)

    def _known(self, device, layer, size, names):
        failed = self._failed.get((self._clock.card(device), layer, size), {})
        times = failed | self._layers(device).get(layer, {}).get(size, {})
        return {name: times[name] for name in names} if all(name in times for name in names) else {}

    def _layers(self, device):
        with self._lock:
            if self._cards is None:
                self._cards = _read(self._path())
            return self._cards.setdefault(self._clock.card(device), {})

    def _keep(self, card, layer, size, times):
        """Keep new times, and write them into the file beside those that are in it by now; a file that is not ours stays as it
        is. Where nothing can be written, the next start times again.
        """
        path = os.path.realpath(self._path())  # what a link leads to
        half = f"{path}.{uuid.uuid4().hex}.part"
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


def _put(cards, card, layer, size, times):
    cards.setdefault(card, {}).setdefault(layer, {}).setdefault(size, {}).update(times)


def rounded(rows):
    """Return a number of rows, rounded down to those that share its times."""
    spare = max(rows.bit_length() - SIGNIFICANT_BITS, 0)
    return rows >> spare << spare


@functools.cache
def _card(device):
    """The name of a CUDA device, and what computes there: versions, and settings that users change by the host's options."""
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


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _fingerprint():
    """Return what tells the source of our own kernels from another."""
    folder = pathlib.Path(__file__).parent
    files = [*folder.glob("kernels/*.py"), folder / "int8.py", folder / "fp8.py", folder / "packing.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:8]


def _read(path):
    """Return what a file has, {} where there is none, or one that is not ours, of which a warning says so."""
    try:
        return _parsed(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        logger.warning(f"{os.path.basename(path)}, beside the profiles, is not used and stays as it is: {why}.")
        return {}


def _parsed(path):
    """Return {card: {layer: {rows: {way: microseconds}}}} of a file. Raises ValueError where it is not ours, OSError where it
    cannot be read.
    """
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("it is no file of kernel times")
    cards = found.get("microseconds")
    if not _is_nested(cards, _is_of_layer):
        raise ValueError("its content is not that of a file of kernel times")
    return cards


def _is_of_layer(layers):
    return _is_nested(layers, lambda sizes: _is_nested(sizes, _is_of_size) and all(map(str.isdecimal, sizes)))


def _is_of_size(times):
    return _is_nested(times, lambda one: type(one) in (int, float) and 0 < one < math.inf)


def _is_nested(value, holds):
    return isinstance(value, dict) and all(map(holds, value.values()))
