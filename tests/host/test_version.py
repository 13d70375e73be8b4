"""A ComfyUI that is older than the pack needs: refused by a sentence when the pack is loaded."""

import asyncio
import sys
import types

import comfyui
import pytest


@pytest.fixture
def load_in(host, tmp_path, monkeypatch, caplog):
    """Return load_in(version), which gives (whether a host of this version can load the pack, the host's log message)."""
    import nodes

    def run(version):
        copy = tmp_path / "comfyui-iec"
        copy.symlink_to(comfyui.ROOT, target_is_directory=True)
        known = set(sys.modules)
        monkeypatch.setitem(sys.modules, "comfyui_version", version and types.SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, "comfy_api.latest", None)  # such hosts lack it
        try:
            return asyncio.run(nodes.load_custom_node(str(copy))), caplog.messages[-1]
        finally:
            for name in set(sys.modules) - known:
                del sys.modules[name]

    return run


@pytest.mark.parametrize("version", ["0.3.64", "0.3.9", "0.2.7", None])
def test_on_an_older_host_the_error_names_the_required_version(load_in, version):
    loaded, said = load_in(version)
    assert not loaded
    assert "ComfyUI-IEC needs ComfyUI 0.3.75 or newer, but this one is " + (version or "") in said


@pytest.mark.parametrize("version", ["0.3.75", "0.3.100", "0.4.0", "0.33.0", "1.0", "0.3.76-2-g1f2e3d"])
def test_supported_host_versions_are_not_refused(load_in, version):
    assert "comfy_api" in load_in(version)[1]  # it got as far as this import
