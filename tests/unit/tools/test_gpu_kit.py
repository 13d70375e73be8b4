"""The kit for a GPU machine without a network: its contents, and the script that runs there."""

import os
import pathlib
import subprocess
import sys
import tarfile

import comfyui
import gpu_kit
import gpu_kit_run
import pytest


def write(folder, *names):
    """Write files of these names below `folder`; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"print('{name}')\n")
    return folder


def names(archive):
    with tarfile.open(archive) as tar:
        return {entry.name for entry in tar if entry.isfile()}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Replace this checkout by a small one, with files that git tracks, ignores and does not know."""
    packed = ("nodes/types.py", "tests/gpu/test_gpu.py", "tools/gpu_tables.py", "web/docs/Node.md", "requirements.txt")
    left_out = ("nodes/assets/model.safetensors", "docs/gpu/card.csv", "docs/page.md", "example_workflows/one.json", "a.png")
    root = write(tmp_path / "checkout", *packed, *left_out, "gone.py", "tools/__pycache__/a.pyc", "output/old")
    (root / ".gitignore").write_text("__pycache__/\n/output/\n")
    for command in ("init", "add ."):
        subprocess.run(["git", *command.split()], cwd=root, check=True, capture_output=True)
    (root / "gone.py").unlink()
    write(root, "new.py")
    monkeypatch.setattr(comfyui, "ROOT", root)
    return root, {".gitignore", *packed}


@pytest.fixture
def kit(tmp_path, checkout, monkeypatch):
    """Return (a kit of the small checkout, a small host and the packages of a replaced pip; pip's arguments)."""
    host = write(tmp_path / "host", "main.py", "comfy/ops.py", "comfy/__pycache__/ops.pyc", "models/a.ckpt", "tests/a.py")
    (host / "custom_nodes").mkdir()
    (host / "custom_nodes/pack").symlink_to(checkout[0])
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        site = pathlib.Path(arguments[arguments.index("--target") + 1])
        write(site, "comfy_kitchen/__init__.py", *(f"comfy_kitchen/backends/{name}/_C.abi3.so" for name in ("cuda", "hip")))

    monkeypatch.setattr(comfyui, "provide", lambda: host)
    monkeypatch.setattr(comfyui, "pip", pip)
    folder = write(tmp_path / "kit", "older.tar.xz")
    gpu_kit.make(folder)
    return folder, calls


def test_versions_are_the_tested_ones():
    lines = comfyui.CONSTRAINTS.read_text().splitlines()
    wanted = gpu_kit.requirements(gpu_kit.PACKAGES)
    assert wanted and set(wanted) <= set(lines)
    with pytest.raises(LookupError, match="no version of nowhere"):
        gpu_kit.requirements(["torchsde", "nowhere"])


def test_packages_are_installed_for_the_other_machine(kit):
    (arguments,) = kit[1]
    assert {"--no-deps", "--only-binary", "--platform=manylinux_2_28_x86_64"} <= set(arguments)
    assert arguments[arguments.index("--python-version") + 1] == "3.12"
    assert arguments[-len(gpu_kit.PACKAGES) :] == tuple(gpu_kit.requirements(gpu_kit.PACKAGES))
    assert names(kit[0] / "site.tar.xz") == {"site/comfy_kitchen/__init__.py", "site/comfy_kitchen/backends/cuda/_C.abi3.so"}


def test_kit_holds_the_tracked_files_without_models_and_pages(kit, checkout):
    assert names(kit[0] / "pack.tar.xz") == {f"pack/{name}" for name in checkout[1]}


def test_kit_has_only_the_host_and_no_older_files(kit):
    assert names(kit[0] / "host.tar.xz") == {"host/main.py", "host/comfy/ops.py"}
    archives = {f"{name}.tar.xz" for name in ("host", "pack", "site", "stand_ins")}
    assert {path.name for path in kit[0].iterdir()} == {"run.py", *archives}


def test_too_large_a_kit_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").write_bytes(bytes(3 * 2**20))
    gpu_kit.report_size(tmp_path)
    assert "3.00 MiB  a" in capsys.readouterr().out
    monkeypatch.setattr(gpu_kit, "LIMIT", 2)
    with pytest.raises(ValueError, match=r"the kit has 3\.0 MiB, and at most 2 MiB can be sent"):
        gpu_kit.report_size(tmp_path)


def test_stand_ins_can_be_imported_like_the_real_packages(tmp_path):
    gpu_kit.write_stand_ins(tmp_path)
    host = "import av\nfrom av.container import InputContainer\nfrom av.subtitles.stream import SubtitleStream"
    subprocess.run([sys.executable, "-c", host], cwd=tmp_path, check=True)


def test_unpacked_pack_finds_the_host_and_installs_nothing(tmp_path):
    inherited = {"PATH": "/bin", "PYTHONPATH": "mine"}
    found = gpu_kit_run.environment(tmp_path, inherited)
    assert found["COMFYUI_DIR"] == str(tmp_path / "host") and found["IEC_OFFLINE"] == "1" and found["PATH"] == "/bin"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "site"), str(tmp_path / "stand_ins"), "mine"]
    assert gpu_kit_run.environment(tmp_path, {})["PYTHONPATH"].endswith("stand_ins")


# a test, and a replacement of tools/gpu_tables.py, which writes a table and its own arguments
TEST = "import os\n\ndef test_kit():\n    assert os.environ['IEC_OFFLINE'] and {passes}\n"
TABLES = "import sys, pathlib\npathlib.Path(sys.argv[2], 'card.md').write_text('a table')\nprint(sys.argv[1:])\n"


@pytest.mark.parametrize("passes", [True, False])
def test_script_runs_the_tests_and_the_tables(tmp_path, checkout, kit, passes):
    root, out = checkout[0], tmp_path / "out"
    (root / "tests/gpu/test_gpu.py").write_text(TEST.format(passes=passes))
    (root / "tools/gpu_tables.py").write_text(TABLES)
    gpu_kit.write_archive(kit[0], "pack", root, gpu_kit.tracked_files(root))
    variables = {"OUT": str(out), "PATH": "", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(kit[0] / "run.py"), "--size", "small"]
    ended = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == (0 if passes else 1), ended.stderr
    assert ended.stdout.endswith("Nothing failed.\n" if passes else "These failed: tests.\n")
    assert (out / "card.md").read_text() == "a table"
    assert "['--output', 'docs/gpu', '--size', 'small']" in (out / "tables.log").read_text()
    assert ("1 passed" if passes else "1 failed") in (out / "tests.log").read_text()
    assert not list(tmp_path.glob("gpu-kit-*"))  # the temporary folder is removed
