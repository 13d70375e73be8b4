"""Pack what a machine with a GPU but no network needs for `make gpu`, as the folder output/gpu-kit.

    python tools/gpu_kit.py                      make it; then copy it to that machine and run its run.py there

That machine has Python 3.12 on x86-64 Linux, with torch 2.11 and common packages (transformers, aiohttp, scipy, matplotlib,
pytest and so on). The kit contains the host, the pack and the few rare packages, in the tested versions. Its size stays below a
limit at which most ways of sending files still work.
"""

import pathlib
import subprocess
import sys
import tarfile
import tempfile

import comfyui

KIT = comfyui.ROOT / "output" / "gpu-kit"
LIMIT = 60  # MiB
RUN = comfyui.ROOT / "tools" / "gpu_kit_run.py"

# Packages without which the host, the pack and the tests cannot be imported, and which a machine made for torch lacks.
PACKAGES = ("comfy-kitchen", "torchsde", "trampoline", "websocket-client")
TARGET = ("--python-version", "3.12", "--implementation", "cp")
PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["--platform=manylinux2014_x86_64"]
# comfy-kitchen's kernels for AMD: three quarters of its size. comfy-kitchen works without them.
AMD = "comfy_kitchen/backends/hip/_C*.so"

# PyAV alone would fill half of the kit. The host imports PyAV on every start, but calls it only for video and sound, which
# neither the tests nor the tables have. These stand-ins replace the modules that the host imports.
STAND_INS = {
    "av/__init__.py": '"""Stands for PyAV, so that the host can be imported without it."""\n',
    "av/container.py": "class InputContainer: ...\n",
    "av/subtitles/__init__.py": "",
    "av/subtitles/stream.py": "class SubtitleStream: ...\n",
}

# Parts of the host's folder that are left out: other people's files, and files that do not run with the host.
NOT_OF_THE_HOST = {*comfyui.WRITTEN, "tests", "tests-unit", "script_examples", ".git"}
# Parts of the pack that are left out: weights (the tests and tables use random ones), pictures, pages and results.
NOT_OF_THE_PACK = {".safetensors", ".png", ".jpg"}
PAGES = {"docs", "example_workflows"}


def requirements(packages):
    """Return `packages` as pip's requirements, each at the version that tools/constraints.txt names.

    Raises LookupError for a package without a version there.
    """
    versions = dict(line.split("==") for line in comfyui.CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    if unknown := sorted(set(packages) - set(versions)):
        raise LookupError(f"tools/constraints.txt has no version of {', '.join(unknown)}")
    return [f"{name}=={versions[name]}" for name in packages]


def tracked_files(root):
    """Return the files below `root` that git tracks and that the GPU's tests and tables may need, as relative paths."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [pathlib.Path(name) for name in listed.split("\0") if name]
    kept = [path for path in paths if path.suffix not in NOT_OF_THE_PACK and path.parts[0] not in PAGES]
    return [path for path in kept if (root / path).is_file()]  # a deleted file stays tracked until the deletion is committed


def host_files(folder):
    """Return the host's own files, as relative paths."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in paths if path.parts[0] not in NOT_OF_THE_HOST and "__pycache__" not in path.parts]


def install_packages(folder):
    """Install the packages for the other machine's Python into `folder`, and remove the parts that it does not use."""
    only = ("--no-deps", "--only-binary", ":all:", "--no-compile", "--target", str(folder))
    comfyui.pip("install", "--quiet", *only, *TARGET, *PLATFORMS, *requirements(PACKAGES))
    for path in folder.glob(AMD):
        path.unlink()


def write_stand_ins(folder):
    """Write the modules of STAND_INS into `folder`."""
    for name, text in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def all_files(folder):
    """Return every file below `folder`, as relative paths."""
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def nameless(entry):
    """Remove the owner from an archive's entry."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write_archive(kit, name, folder, files):
    """Write `files` of `folder` into the kit's archive `name`, inside a folder of the same name."""
    with tarfile.open(kit / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in files:
            archive.add(folder / path, f"{name}/{path.as_posix()}", filter=nameless)


def make(kit):
    """Write the kit's archives and its run.py into the folder `kit`, replacing older ones."""
    kit.mkdir(parents=True, exist_ok=True)
    for old in kit.iterdir():
        old.unlink()
    host = comfyui.provide()
    write_archive(kit, "host", host, host_files(host))
    write_archive(kit, "pack", comfyui.ROOT, tracked_files(comfyui.ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        site, stand_ins = pathlib.Path(scratch, "site"), pathlib.Path(scratch, "stand_ins")
        install_packages(site)
        write_archive(kit, "site", site, all_files(site))
        write_stand_ins(stand_ins)
        write_archive(kit, "stand_ins", stand_ins, all_files(stand_ins))
    (kit / "run.py").write_bytes(RUN.read_bytes())


def report_size(kit):
    """Print the total size of the kit's files. Raises ValueError if it is above LIMIT."""
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted(kit.iterdir())}
    for name, size in sizes.items():
        print(f"{size:7.2f} MiB  {name}")
    if (total := sum(sizes.values())) > LIMIT:
        raise ValueError(f"the kit has {total:.1f} MiB, and at most {LIMIT} MiB can be sent; leave something out")
    print(f"{total:7.2f} MiB  in {kit}")


if __name__ == "__main__":
    try:
        make(KIT)
        report_size(KIT)
    except (OSError, LookupError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"no kit could be made: {error}")
