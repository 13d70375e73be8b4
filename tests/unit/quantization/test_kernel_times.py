"""Backends of a layer are timed once on each card, and the times are kept in a file, without overwriting foreign files."""

import json
import math
import os

import pytest
import torch

from iec_core.quantization import kernel_times
from iec_core.quantization.kernel_times import CudaClock, KernelTimes, rounded

DEVICE, LAYER = torch.device("cpu"), "Linear 64 to 32"


class Clock:
    """Replace a GPU's clock: it returns the times that are given to it, in microseconds."""

    def __init__(self, card="a card", **times):
        self.name, self.known, self.asked, self.free = card, times or {"fast": 1.5, "slow": 4.0}, [], True

    def covers(self, device):
        return device.type == "cpu"

    def is_free(self):
        return self.free

    def card(self, device):
        return self.name

    def times(self, ways, device):
        self.asked.append(sorted(ways))
        return {name: self.known[name] for name in ways}


def ways(*names):
    return {name: lambda: None for name in names or ("slow", "fast")}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "profiles" / "kernel_times.json"


@pytest.fixture
def kept(file):
    """Return kept(clock), which gives a KernelTimes on the test's file."""
    return lambda clock: KernelTimes(lambda: str(file), clock)


def test_a_layer_is_timed_once_for_sizes_that_differ_little(kept):
    clock = Clock()
    times = kept(clock)
    for _ in range(2):
        for rows in (4096, 4500, 5119):
            assert times.of(DEVICE, LAYER, rows, ways()) == {"fast": 1.5, "slow": 4.0}
    assert len(clock.asked) == 1
    times.of(DEVICE, LAYER, 5120, ways()), times.of(DEVICE, "Linear 64 to 33", 4096, ways())
    assert len(clock.asked) == 3


@pytest.mark.parametrize(("rows", "shared"), [(0, 0), (1, 1), (7, 7), (8, 8), (9, 8), (77, 64), (95, 80), (4095, 3584)])
def test_sizes_with_shared_times_differ_by_less_than_a_quarter(rows, shared):
    assert rounded(rows) == shared and rows <= shared * 1.25


def test_times_are_kept_for_the_next_start(kept, file):
    kept(Clock()).of(DEVICE, LAYER, 100, ways())
    clock = Clock(fast=9.0, slow=9.0)
    assert kept(clock).of(DEVICE, LAYER, 100, ways()) == {"fast": 1.5, "slow": 4.0} and clock.asked == []
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("other", ["another card", "a card, of another driver"])
def test_times_of_another_card_or_driver_are_not_used(kept, other):
    kept(Clock()).of(DEVICE, LAYER, 100, ways())
    clock = Clock(other, fast=9.0, slow=8.0)
    assert kept(clock).of(DEVICE, LAYER, 100, ways()) == {"fast": 9.0, "slow": 8.0} and len(clock.asked) == 1
    assert kept(Clock()).of(DEVICE, LAYER, 100, ways())["fast"] == 1.5  # and both are there


def test_two_processes_write_one_file(kept):
    one, other = kept(Clock()), kept(Clock())
    one.of(DEVICE, "one", 1, ways()), other.of(DEVICE, "other", 1, ways()), one.of(DEVICE, "third", 1, ways())
    clock = Clock()
    late = kept(clock)
    assert all(late.of(DEVICE, layer, 1, ways()) for layer in ("one", "other", "third")) and clock.asked == []


def test_a_new_backend_is_timed(kept):
    """This happens after a missing backend has been installed."""
    clock = Clock(fast=1.0, slow=2.0, new=0.5)
    times = kept(clock)
    times.of(DEVICE, LAYER, 1, ways())
    assert times.of(DEVICE, LAYER, 1, ways("fast", "slow", "new"))["new"] == 0.5 and len(clock.asked) == 2


def test_backends_are_timed_together(kept):
    """An older time may come from a machine under load, and is not comparable with a new one."""
    clock = Clock(fast=1.0, slow=2.0, new=0.5)
    times = kept(clock)
    times.of(DEVICE, LAYER, 1, ways())
    clock.known["slow"] = 3.0
    assert times.of(DEVICE, LAYER, 1, ways("slow", "new")) == {"slow": 3.0, "new": 0.5}
    assert times.known(DEVICE, LAYER, 1, ("fast", "slow", "new")) == {"fast": 1.0, "slow": 3.0, "new": 0.5}


def test_times_of_the_largest_size_with_all_backends(kept):
    clock = Clock()
    times = kept(clock)
    assert times.known_of_most(DEVICE, LAYER, ("fast", "slow")) == {}
    for rows, slow in ((1024, 3.0), (64, 5.0), (96, 6.0)):
        clock.known["slow"] = slow
        times.of(DEVICE, LAYER, rows, ways())
    times.of(DEVICE, LAYER, 4096, ways("slow"))
    assert times.known_of_most(DEVICE, LAYER, ("fast", "slow")) == {"fast": 1.5, "slow": 3.0}
    assert times.known_of_most(DEVICE, LAYER, ("slow",)) == {"slow": 6.0}
    assert times.known_of_most(DEVICE, LAYER, ("other",)) == times.known_of_most(DEVICE, "another", ("slow",)) == {}


def test_a_device_that_cannot_be_timed_costs_nothing(file):
    times = KernelTimes(lambda: pytest.fail("read a file"), CudaClock())
    assert times.of(DEVICE, LAYER, 1, ways()) == times.known(DEVICE, LAYER, 1, ("fast",)) == {} and not times.covers(DEVICE)
    assert times.known_of_most(DEVICE, LAYER, ("fast",)) == {} and not file.exists()


def test_during_graph_capture_only_known_times_are_used(kept):
    clock = Clock()
    times = kept(clock)
    times.of(DEVICE, LAYER, 1, ways())
    clock.free = False
    assert times.of(DEVICE, LAYER, 1, ways()) == {"fast": 1.5, "slow": 4.0} and times.of(DEVICE, LAYER, 2, ways()) == {}
    clock.free = True
    assert times.of(DEVICE, LAYER, 2, ways()) == {"fast": 1.5, "slow": 4.0} and len(clock.asked) == 2


@pytest.mark.parametrize("where", ["way", "clock"])
def test_timing_without_enough_memory_has_no_result(kept, file, monkeypatch, where):
    """Nothing is tried again for a while."""
    clock, called, now = Clock(), [], [0.0]
    monkeypatch.setattr(kernel_times.time, "monotonic", lambda: now[0])
    now[0] = 1000.0

    def greedy(*_):
        called.append(1)
        if now[0] < 1030:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"fast": 1.5, "slow": 4.0}

    given = ways() if where == "clock" else {"slow": lambda: None, "fast": greedy}
    if where == "clock":
        clock.times = greedy
    times = kept(clock)
    for at in (1000.0, 1001.0, 1059.0):
        now[0] = at
        assert times.of(DEVICE, LAYER, 1, given) == {} and len(called) == 1 and not file.exists()
    now[0] = 1061.0
    assert times.of(DEVICE, LAYER, 1, given) == {"fast": 1.5, "slow": 4.0}


def broken():
    raise RuntimeError("out of resource: shared memory\nand more")


def test_a_backend_that_fails_is_the_slowest_and_reported_once(kept, file, caplog):
    clock = Clock()
    times, given = kept(clock), {"slow": lambda: None, "fast": broken}
    for rows in (1, 1, 2):
        assert times.of(DEVICE, LAYER, rows, given) == {"fast": math.inf, "slow": 4.0}
    why = "RuntimeError: out of resource: shared memory."
    assert [record.message for record in caplog.records] == [
        f"[ComfyUI-IEC] fast cannot compute a layer of the kind '{LAYER}': {why}"
    ] * 2  # once per size
    assert clock.asked == [["slow"], ["slow"]] and "fast" not in file.read_text()
    assert times.known_of_most(DEVICE, LAYER, ("fast", "slow")) == {"fast": math.inf, "slow": 4.0}
    again = kept(Clock())  # a restart tries again
    assert again.known_of_most(DEVICE, LAYER, ("fast", "slow")) == {} and again.of(DEVICE, LAYER, 1, ways())["fast"] == 1.5


def test_nothing_is_recorded_if_all_backends_fail_on_an_input(kept, file, caplog):
    """The conditioning of another model causes this: the user sees that error, and fixes it."""
    clock = Clock()
    times = kept(clock)
    assert times.of(DEVICE, LAYER, 96, {"slow": broken, "fast": broken}) == {} and not file.exists() and caplog.records == []
    for rows in (96, 20):
        assert times.of(DEVICE, LAYER, rows, ways("slow", "fast")) == {"fast": 1.5, "slow": 4.0}


def test_deleted_times_are_measured_again_after_a_restart(kept, file):
    times = kept(Clock())
    times.of(DEVICE, "one", 1, ways())
    file.unlink()
    times.of(DEVICE, "other", 1, ways())
    clock = Clock()
    kept(clock).of(DEVICE, "one", 1, ways())
    assert len(clock.asked) == 1


def test_newer_times_of_another_process_are_kept(kept):
    one, other = kept(Clock()), kept(Clock(fast=9.0, slow=9.0))
    assert other.known(DEVICE, "both", 1, ("fast",)) == {}  # it has read the empty file
    one.of(DEVICE, "both", 1, ways()), other.of(DEVICE, "both", 1, ways()), one.of(DEVICE, "another", 1, ways())
    assert kept(Clock()).known(DEVICE, "both", 1, ("fast",)) == {"fast": 9.0}


def test_a_symbolic_link_is_kept(kept, file, tmp_path):
    file.parent.mkdir()
    shared = tmp_path / "shared.json"
    file.symlink_to(shared)
    kept(Clock()).of(DEVICE, LAYER, 1, ways())
    assert file.is_symlink() and kept(Clock()).known(DEVICE, LAYER, 1, ("fast",)) and shared.is_file()


def of_layer(sizes):
    return json.dumps({"format": kernel_times.FORMAT, "microseconds": {"a card": {LAYER: sizes}}})


FOREIGN = {
    "no JSON": "a user's notes",
    "other JSON": "[1, 2]",
    "of another": json.dumps({"format": "another", "microseconds": {}}),
    "of a later version": json.dumps({"format": "iec kernel times 2", "microseconds": {}}),
    "without times": json.dumps({"format": kernel_times.FORMAT}),
    "rows without times": of_layer({"1": 3.0}),
    "no number of rows": of_layer({"x": {"fast": 1.0}}),
    "no time": of_layer({"1": {"fast": True}}),
    "less than no time": of_layer({"1": {"fast": -1.0}}),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_program_is_unchanged(kept, file, caplog, content):
    file.parent.mkdir()
    file.write_text(content)
    clock = Clock()
    times = kept(clock)
    for rows in (1, 2, 1):
        assert times.of(DEVICE, LAYER, rows, ways()) == {"fast": 1.5, "slow": 4.0}
    assert len(clock.asked) == 2 and file.read_text() == content and os.listdir(file.parent) == [file.name]
    (record,) = caplog.records
    assert record.message.startswith(
        "[ComfyUI-IEC] kernel_times.json in the folder of the profiles is not used and not changed: "
    )


def test_a_folder_of_that_name_does_no_harm(kept, file):
    file.mkdir(parents=True)
    assert kept(Clock()).of(DEVICE, LAYER, 1, ways())["fast"] == 1.5 and os.listdir(file.parent) == [file.name]


def test_times_are_kept_in_memory_if_the_file_cannot_be_written(kept, file):
    file.parent.write_text("a file where the folder would be")
    clock = Clock()
    times = kept(clock)
    for _ in range(2):
        assert times.of(DEVICE, LAYER, 1, ways())["slow"] == 4.0
    assert len(clock.asked) == 1


class TestCudaClock:
    """Its arithmetic, with events whose times the test sets."""

    @pytest.fixture
    def now(self, monkeypatch):
        """Return now; now[0] is the time in seconds."""
        now = [0.0]

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = now[0]

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        return now

    def test_times_are_medians_of_alternating_rounds(self, now):
        calls = []

        def way(name, seconds):
            def call():
                calls.append(name)
                now[0] += 10 if calls.count(name) in (1, 7) else seconds  # a first call that compiles, and a single slow call

            return call

        found = CudaClock().times({"short": way("short", 50e-6), "long": way("long", 0.02)}, DEVICE)
        assert found == pytest.approx({"short": 50, "long": 20_000})
        assert calls[:4] == ["short", "long"] * 2  # to compile, and to measure how long they take
        in_a_round = [*["short"] * 6, "long"]  # 0.3 ms, or once
        assert calls[4:] == in_a_round * 5

    @pytest.mark.parametrize(("seconds", "calls"), [(0.0, 20), (1e-6, 20), (1e-4, 3), (3e-4, 1), (1.0, 1)])
    def test_rounds_are_short(self, seconds, calls):
        assert kernel_times._calls(seconds) == calls

    def test_times_are_per_card_driver_and_library_versions(self, monkeypatch):
        versions = {"triton": "3.6", "comfy-kitchen": "0.2"}
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
        monkeypatch.setattr(kernel_times, "_version", versions.__getitem__)
        monkeypatch.setattr(kernel_times.int8, "kitchen_backends", lambda: ["cuda", "triton"])
        card = kernel_times._card.__wrapped__(DEVICE)
        versions = f"torch {torch.__version__}, cuDNN 91002, Triton 3.6, comfy-kitchen 0.2 (cuda triton)"
        assert card == f"a GPU, driver 13000, {versions}, kernels {kernel_times._fingerprint()}"
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        assert kernel_times._card.__wrapped__(DEVICE) == f"{card}, cuDNN benchmark"

    def test_versions(self):
        assert torch.__version__.startswith(kernel_times._version("torch").split("+")[0])
        assert kernel_times._version("a-package-that-is-not-there") == "none"

    def test_only_gpus_are_timed(self, monkeypatch):
        assert [CudaClock().covers(torch.device(name)) for name in ("cpu", "mps", "cuda", "cuda:1")] == [
            False,
            False,
            True,
            True,
        ]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not CudaClock().is_free()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert CudaClock().is_free()
