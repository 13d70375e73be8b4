"""How long the ways to compute a quantized layer take on a GPU: timed at first use, and kept in a small file.

Which way is the fastest is a matter of the card, the layer and the size of what comes in; no rule knows it. The file has the
times of every card, by its driver and by the versions of all that computes there: with another one, they are taken anew.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import pathlib
import statistics
import threading
import uuid

import torch

from .devices import is_out_of_memory

FORMAT = "iec kernel times 1"
ROUNDS, ROUND_SECONDS, MOST_CALLS = 5, 3e-4, 20  # of a way, in turn with the others; how long one lasts; its most calls
SIGNIFICANT_BITS = 3  # of a number of rows: sizes that differ by less share their times


class CudaClock:
    """Times on a CUDA device (or ROCm's), by its events."""

    def can_time(self, device):
        """Tell whether a torch.device can be timed now: not while a graph of its work is taken, which a wait would end."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

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
        self._failed, self._lock = {}, threading.Lock()

    def of(self, device, layer, rows, ways):
        """Return {name: microseconds} of ways={name: function without arguments} to compute a layer for so many rows. Each is
        timed once. layer: what kind it is, in words. {}: where the device cannot be timed now, or has too little memory.

        A way that ends in an error is logged as a warning, and takes math.inf for as long as the process lives.
        """
        if not self._clock.can_time(device):
            return {}
        sizes, size = self._of_card(device).setdefault(layer, {}), str(rounded(rows))
        failed = self._failed.setdefault((device, layer), {})
        if set(ways) - set(sizes.get(size, ())) - set(failed):
            try:
                sizes[size] = self._measured(device, layer, ways, failed)
            except Exception as error:
                if is_out_of_memory(error):
                    return {}
                raise
            self._save()
        return sizes[size] | failed

    def of_largest(self, device, layer):
        """Return what `of` has returned for the most rows of all that a layer was timed for; {} where it never was."""
        sizes = self._of_card(device).get(layer, {}) if self._clock.can_time(device) else {}
        return sizes[max(sizes, key=int)] if sizes else {}

    @torch.no_grad()
    def _measured(self, device, layer, ways, failed):
        """Time the ways that work; take up the others in `failed`."""
        for name, way in ways.items():
            try:
                name in failed or way()  # compiles what it needs
            except Exception as error:  # of any kind: compilers and drivers have their own
                if is_out_of_memory(error):
                    raise
                failed[name] = math.inf
                why = f"{type(error).__name__}: {str(error).strip() or 'without a word'}".splitlines()[0]
                logging.warning(f"[ComfyUI-IEC] {name} does not compute a layer of the kind '{layer}': {why}.")
        return self._clock.times({name: way for name, way in ways.items() if name not in failed}, device)

    def _of_card(self, device):
        if self._cards is None:
            self._cards = _read(self._path())
        return self._cards.setdefault(self._clock.card(device), {})

    def _save(self):
        """Write the file, with what other processes have written meanwhile; one that is not ours stays as it is. Where that
        cannot be, the next start times again.
        """
        path = self._path()
        half = f"{path}.{uuid.uuid4().hex}.part"
        with self._lock, contextlib.suppress(OSError, ValueError):
            cards = _parsed(path) if os.path.lexists(path) else {}
            for name, layers in self._cards.items():
                for layer, sizes in layers.items():
                    cards.setdefault(name, {}).setdefault(layer, {}).update(sizes)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                text = json.dumps({"format": FORMAT, "microseconds": cards}, indent=1)
                pathlib.Path(half).write_text(text, encoding="utf-8")
                os.replace(half, path)
            finally:
                with contextlib.suppress(OSError):
                    os.remove(half)


def rounded(rows):
    """Return a number of rows, rounded down to those that share its times."""
    spare = max(rows.bit_length() - SIGNIFICANT_BITS, 0)
    return rows >> spare << spare


@functools.cache
def _card(device):
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
    versions = [f"torch {torch.__version__}", f"Triton {_version('triton')}", f"comfy-kitchen {_version('comfy-kitchen')}"]
    return ", ".join([torch.cuda.get_device_name(device), f"driver {driver}", *versions, f"kernels {_fingerprint()}"])


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _fingerprint():
    """Return what tells the source of our own kernels from another."""
    folder = pathlib.Path(__file__).parent
    files = [*folder.glob("kernels/*.py"), folder / "int8.py", folder / "fp8.py", folder / "quantization.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:8]


def _read(path):
    """Return what a file has, {} where there is none, or one that is not ours, of which a warning says so."""
    try:
        return _parsed(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        logging.warning(f"[ComfyUI-IEC] {os.path.basename(path)}, beside the profiles, is not used and stays as it is: {why}.")
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
    return _is_nested(times, lambda time: type(time) in (int, float) and 0 < time < math.inf)


def _is_nested(value, holds):
    return isinstance(value, dict) and all(map(holds, value.values()))
