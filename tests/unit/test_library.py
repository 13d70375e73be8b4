"""`iec_core` as a library: its public names, its example, what its import costs, and its errors."""

import doctest
import inspect
import subprocess
import sys

import pytest
import torch
from comfyui import ROOT

import iec_core
from iec_core import CorrectionSettings, IECError, errors, parse_cache_schedule


def test_the_example_runs():
    with torch.random.fork_rng():
        failed, tried = doctest.testmod(iec_core)
    assert (failed, tried > 5) == (0, True)


def test_every_public_name_is_documented():
    assert all(inspect.getdoc(getattr(iec_core, name)) for name in iec_core.__all__)


def test_import_needs_only_torch():
    heavy = {"triton", "comfy", "comfy_kitchen", "diffusers", "iec_core.quantization.kernels"}
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import pack; pack.load('iec_core'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "iec_core.correction.iteration" in loaded and not heavy & set(loaded)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: CorrectionSettings.parse(lambda_=2),
        lambda: parse_cache_schedule("sometimes"),
        lambda: CorrectionSettings.parse("x"),
        lambda: CorrectionSettings.parse("steps:" + "9" * 5000),
        lambda: parse_cache_schedule("power:" + "9" * 5000 + ",1"),
    ],
)
def test_settings_are_refused_by_class(refused):
    with pytest.raises(errors.SettingsError) as raised:
        refused()
    assert isinstance(raised.value, IECError) and isinstance(raised.value, ValueError)


def test_the_core_raises_only_its_own_error_classes():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "iec_core").rglob("*.py")}
    assert [str(path) for path, text in sources.items() if "raise ValueError(" in text] == []
