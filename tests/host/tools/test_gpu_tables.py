"""The tables of `make gpu`, on a CPU and tiny networks: each kind of row is measured, and no failing row stops the others."""

import csv
import itertools

import gpu_tables
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def bench(host):
    return gpu_tables.Bench(host.nodes, gpu_tables.SIZES["small"])


@pytest.fixture
def short(monkeypatch):
    """Shorten runs to three steps; everything that is timed runs once and takes 2 ms, except the baseline."""
    monkeypatch.setattr(gpu_tables, "STEPS", 3)
    monkeypatch.setattr(gpu_tables.Bench, "milliseconds", lambda self, ways, rounds=5: dict.fromkeys(ways, 2.0) | run(ways))


def run(ways):
    for way in ways.values():
        way()
    return {name: taken for name, taken in (("baseline", 6.0), ("NCHW", 5.0)) if name in ways}


def tasks(bench, table):
    return {task.variant: task for task in gpu_tables.TABLES[table](bench)}


def test_networks(bench, short):
    found = tasks(bench, "networks")
    assert found["float32"].take() == {"milliseconds": 2.0, "weights": 1.0, "peak_mib": None}
    row = found["W8A8, 8-bit"].take()
    layers = int(row["note"].split()[0])
    assert row["note"] == f"{layers} of {layers} quantized layers in 8 bits" and layers > 100
    assert row["ratio"] == 3.0 and 0.25 < row["weights"] < 0.3  # a quarter of float32
    assert found["W8A16"].take()["note"].startswith("0 of ")
    (_, reason) = gpu_tables._measured("networks", found["torchao's int8 dynamic"])
    assert reason is False


def test_convolutions(bench, short):
    every = list(gpu_tables.convolutions(bench))
    assert len(every) == 2 * len({task.subject for task in every}) > 20
    for task in every[:2]:
        assert task.take() == {
            "milliseconds": 2.0, "ratio": 2.5, "of_peak": None, "note": "channels last: 2 ms, 1.00 times as fast"
        }  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_equal_the_convolutions_flops(stride):
    x, weight = torch.zeros(2, 5, 9, 8), torch.zeros(7, 5, 3, 3)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(x, weight, None, stride, 1)
    layer = 7, (3, 3), (stride, stride), (1, 1)
    assert gpu_tables._operations(tuple(x.shape), layer) == counter.get_total_flops()


def test_caches(bench, short):
    found = tasks(bench, "caches")
    assert set(found) == {"DeepCache 2", "DeepCache 3", "DeepCache 5", "CacheQuant 3, dps"}
    row = found["DeepCache 3"].take()
    assert row["ratio"] == 3.0 and 1.5 < row["operations"] < 3  # one of three steps is evaluated in full
    assert found["CacheQuant 3, dps"].take()["operations"] > 1


def test_steps(bench, monkeypatch):
    seconds = itertools.cycle((6.0, 5.0, 2.0))  # a full step, the same without a cache, a cached step
    monkeypatch.setattr(gpu_tables.cached_steps, "seconds", lambda evaluation: evaluation() or next(seconds))
    row = tasks(bench, "steps")["branch 0"].take()
    assert (row["milliseconds"], row["ratio"]) == (2000.0, 3.0) and row["operations"] > 5
    over = row["operations"] / 3
    assert row["note"] == f"time over operations {over:.2f}; a full step takes 1.200 of one without a cache"


def test_tables_of_everything_together_and_of_corrections(bench, short):
    found = tasks(bench, "together")
    assert set(found) == {"W8A8, IEC auto", "W8A8, DeepCache 3", "W8A8, DeepCache 3, IEC auto"}
    assert found["W8A8, DeepCache 3, IEC auto"].take() == {"milliseconds": 2.0, "ratio": 3.0, "peak_mib": None}
    for task in tasks(bench, "correction").values():
        assert task.take()["ratio"] == 3.0


@pytest.fixture
def written(bench, monkeypatch, tmp_path):
    """Return written(tasks, minutes), which gives (number of failed rows, the CSV's rows, the page) of a table of these
    tasks.
    """

    def write(given, minutes=1):
        def table(bench):
            """What was made up."""
            yield from given

        monkeypatch.setitem(gpu_tables.TABLES, "made up", table)
        writer = gpu_tables.Writer(tmp_path / "gpu", "tools/gpu_tables.py")
        failed = gpu_tables.measure(bench, writer, ["made up"], minutes)
        with open(tmp_path / "gpu" / "cpu.csv", encoding="utf-8") as file:
            return failed, list(csv.DictReader(file)), (tmp_path / "gpu" / "cpu.md").read_text(encoding="utf-8")

    return write


def test_a_failed_row_does_not_affect_the_others(written):
    def fail():
        raise RuntimeError("no kernel image\nand more")

    def nothing():
        raise gpu_tables.quantization.NotThere("it is not installed")

    row = gpu_tables.Task("a", "one", lambda: {"milliseconds": 1.23456, "ratio": 2.0, "note": "so | so"})
    given = [gpu_tables.Task("a", "bad", fail), gpu_tables.Task("a", "absent", nothing), row]
    failed, rows, page = written(given)
    assert failed == 1 and [row["note"] for row in rows] == [
        "failed: RuntimeError: no kernel image", "not measured: it is not installed", "so | so"
    ]  # fmt: skip
    assert [rows[2][name] for name in ("table", "subject", "variant", "milliseconds", "ratio", "weights")] == [
        "made up", "a", "one", "1.235", "2", ""
    ]  # fmt: skip
    assert "## Made up\n\nWhat was made up.\n\n| of | variant | ms | times as fast | note |\n" in page
    assert "| a | one | 1.235 | 2 | so / so |" in page


def test_no_row_begins_after_the_time_limit(written):
    _, rows, _ = written([gpu_tables.Task("a", name, lambda: pytest.fail("measured")) for name in ("one", "two")], minutes=-1)
    assert [row["note"] for row in rows] == ["not measured: -1 minutes were over"]


def test_rows_are_written_as_soon_as_they_are_measured(written, tmp_path):
    def look():
        text = (tmp_path / "gpu" / "cpu.csv").read_text(encoding="utf-8")
        return {"note": f"{text.count('first')} before"}

    _, rows, _ = written([gpu_tables.Task("a", "first", dict), gpu_tables.Task("a", "second", look)])
    assert rows[1]["note"] == "1 before"
