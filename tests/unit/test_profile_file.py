"""Files that are no profile, or of another kind or version, are refused with a sentence, by both kinds alike."""

import pytest
import safetensors.torch
import torch

from iec_core.activation_scales import ActivationScales
from iec_core.cachequant import CacheProfile

KINDS = {"cache profile": CacheProfile, "quantization profile": ActivationScales}
FORMATS = {"cache profile": "iec_cache_profile", "quantization profile": "iec_quantization_profile"}


def refusal(path, kind):
    with pytest.raises(ValueError, match=r"; calibrate anew$") as refused:
        KINDS[kind].load(path)
    return str(refused.value)


@pytest.fixture
def refusal_of(tmp_path):
    """refusal_of(kind, about): the sentence for a file of one tensor and these metadata."""

    def of(kind, about):
        safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", about)
        return refusal(tmp_path / "other.safetensors", kind)

    return of


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [b"", b"not a tensor file", None])
def test_what_is_no_tensor_file_is_refused(tmp_path, kind, content):
    path = tmp_path / "other.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert refusal(path, kind).startswith("it cannot be read as a .safetensors file (")


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_or_version_is_refused(refusal_of, kind):
    right, (other,) = {"format": FORMATS[kind], "version": "1"}, set(FORMATS.values()) - {FORMATS[kind]}
    for about in (None, {**right, "format": other}, {**right, "version": "2"}, {"format": FORMATS[kind]}):
        assert refusal_of(kind, about) == f"it is no {kind}, or one of another version; calibrate anew"
    assert refusal_of(kind, right) == f"its content is not that of a {kind}; calibrate anew"
