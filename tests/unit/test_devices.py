"""The abilities of a device are detected for each device, and a lack of memory is not taken as an answer."""

import pytest
import torch

from iec_core.devices import has_float8, once_a_device
from iec_core.quantization import fp8, int8


@pytest.fixture
def asked():
    """Return (decorated probe, devices that it was tried on, answers by device: a bool or an error to raise)."""
    tried, answers = [], {}

    @once_a_device
    def probe(device):
        tried.append(device)
        if isinstance(answers[device], Exception):
            raise answers[device]
        return answers[device]

    return probe, tried, answers


def test_two_devices_of_a_kind_are_probed_separately(asked):
    probe, tried, answers = asked
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    answers.update({one: True, other: False})
    assert [probe(one), probe(other), probe("cuda:0"), probe("cuda:1")] == [True, False, True, False]
    assert tried == [one, other]


@pytest.mark.parametrize("error", [RuntimeError("not implemented for 'Char'"), NotImplementedError(), TypeError("no float8")])
def test_a_probe_that_raises_an_error_gives_false(asked, error):
    probe, tried, answers = asked
    answers[torch.device("mps")] = error
    assert not probe("mps") and not probe("mps") and len(tried) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2.00 MiB"), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)  # fmt: skip
def test_out_of_memory_in_a_probe_is_not_remembered(asked, error):
    probe, _, answers = asked
    answers[torch.device("cuda", 0)] = error
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            probe("cuda:0")
        assert raised.value is error
    answers[torch.device("cuda", 0)] = True
    assert probe("cuda:0")


def test_the_probes_of_this_processor():
    assert not fp8.has_scaled_mm("cpu") and has_float8("cpu")
    assert int8.has_exact_int_mm("cpu") == int8.has_exact_int_mm(torch.device("cpu"))
    if not torch.backends.mps.is_available():
        assert not has_float8("mps")


def test_probe_results_are_constants_in_compiled_functions():
    def ask(x):
        return x + 1 if int8.has_exact_int_mm(x.device) else x - 1

    expected = ask(torch.zeros(2))
    assert torch.equal(torch.compile(ask, backend="eager", fullgraph=True)(torch.zeros(2)), expected)
