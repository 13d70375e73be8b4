"""Both kinds of profile refuse, with a sentence, files that are not profiles or have another kind or version."""

import os
import pathlib

import pytest
import safetensors.torch
import torch

from iec_core.caching.cachequant import FACTS, CacheProfile
from iec_core.file_kinds import kind_of
from iec_core.quantization.activation_scales import ActivationScales

KINDS = {"cache profile": CacheProfile, "quantization profile": ActivationScales}
FORMATS = {"cache profile": "iec_cache_profile", "quantization profile": "iec_quantization_profile"}


def refusal(path, kind):
    with pytest.raises(ValueError, match=r"; calibrate again$") as refused:
        KINDS[kind].load(path)
    return str(refused.value)


@pytest.fixture
def refusal_of(tmp_path):
    """Return refusal_of(kind, about), which gives the sentence for a file of one tensor and these metadata."""

    def of(kind, about):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", about)
        return refusal(tmp_path / "other.safetensors", kind)

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_a_file_that_is_not_a_tensor_file_is_refused(tmp_path, kind, content):
    path = tmp_path / "other.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert refusal(path, kind).startswith("it cannot be read (")


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_or_version_is_refused(refusal_of, kind):
    right, (other,) = {"format": FORMATS[kind], "version": "1"}, set(FORMATS.values()) - {FORMATS[kind]}
    for about in (None, {**right, "format": other}, {**right, "version": "2"}, {"format": FORMATS[kind]}):
        assert refusal_of(kind, about) == f"it is not a {kind}, or is one of another version; calibrate again"
    assert refusal_of(kind, right) == f"its content is not that of a {kind}; calibrate again"


def whole(kind):
    """Return a profile of a kind."""
    some, sigmas = torch.ones(4), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    if kind == "quantization profile":
        return ActivationScales({"quantization": "W8A8"}, some, ("a",), sigmas[:1], torch.ones(1, 1))
    return CacheProfile(dict.fromkeys(FACTS, "1"), some, sigmas, (0, 1), 1, {})


@pytest.mark.parametrize("name", ["fingerprint", "sigmas"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_type_that_torch_cannot_compute_in_is_refused(tmp_path, kind, name):
    profile = whole(kind)
    setattr(profile, name, getattr(profile, name).to(torch.float8_e5m2))
    profile.save(tmp_path / "net.safetensors")
    assert refusal(tmp_path / "net.safetensors", kind) == f"its content is not that of a {kind}; calibrate again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_file_is_refused_without_its_path(tmp_path, kind):
    why = "it cannot be read (No such file or directory); calibrate again"
    assert refusal(tmp_path / "none.safetensors", kind) == why


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_refused(tmp_path, kind):
    whole(kind).save(tmp_path / "net.safetensors")
    os.truncate(tmp_path / "net.safetensors", os.path.getsize(tmp_path / "net.safetensors") - 1)
    assert refusal(tmp_path / "net.safetensors", kind).startswith("it cannot be read (")


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="this system does not list what is mapped")
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_file_is_not_mapped(tmp_path, kind):
    """Windows cannot replace a mapped file; the library's own reader maps a file as long as one of its tensors exists."""
    path = tmp_path / "net.safetensors"
    whole(kind).save(path)
    profile = KINDS[kind].load(path)
    assert torch.equal(profile.fingerprint, torch.ones(4))
    assert str(path) not in pathlib.Path("/proc/self/maps").read_text()


def test_the_kind_of_a_file_is_read_from_its_header_only(tmp_path):
    path = tmp_path / "net.safetensors"
    for about, kind in [
        ({"format": "iec_cache_profile"}, "cache profile"),
        ({"format": "iec_quantization_profile", "version": "9"}, "quantization profile"),
        ({"iec.quantized": "damaged"}, "quantized model"),
        ({"format": "pt"}, None),
        (None, None),
    ]:
        safetensors.torch.save_file({"weight": torch.zeros(2)}, path, about)
        assert kind_of(path) == kind
    twice = b'{"__metadata__":{"iec.quantized":""},"__metadata__":{}}'
    for content in (b"", b"\xff" * 20, *(len(text).to_bytes(8, "little") + text for text in (b"[" * 9, b"[]", twice))):
        path.write_bytes(content)
        assert kind_of(path) is None
    assert kind_of(tmp_path) is None
