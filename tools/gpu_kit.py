"""Pack what a machine with a GPU but no network needs for `make gpu`, as the folder output/gpu-kit.

    python tools/gpu_kit.py                      make it; then copy it to that machine and run its run.py there

That machine brings Python 3.12 on x86-64 Linux with torch 2.11 and packages that are common beside it (transformers, aiohttp,
scipy, matplotlib, pytest and so on). The kit brings the host, the pack and the few packages that are rare, in the tested
versions. It stays below a size at which it can still be sent by most means.
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

# What the host, the pack and the tests cannot be imported without and a machine made for torch lacks.
PACKAGES = ("comfy-kitchen", "torchsde", "trampoline", "websocket-client")
TARGET = ("--python-version", "3.12", "--implementation", "cp")
PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["--platform=manylinux2014_x86_64"]
# comfy-kitchen's kernels for AMD: three quarters of its size, and it goes without them where they are missing.
AMD = "comfy_kitchen/backends/hip/_C*.so"

# PyAV alone would fill half of the kit. The host imports it on every start, yet calls it for video and sound only, which
# neither the tests nor the tables have: these stand for what it imports.
STAND_INS = {
    "av/__init__.py": '"""Stands for PyAV, so that the host can be imported without it."""\n',
    "av/container.py": "class InputContainer: ...\n",
    "av/subtitles/__init__.py": "",
    "av/subtitles/stream.py": "class SubtitleStream: ...\n",
}

# Of the host's folder: what others have put there, and what does not run with it.
NOT_OF_THE_HOST = {*comfyui.WRITTEN, "tests", "tests-unit", "script_examples", ".git"}
# Of the pack: weights (the tests and tables have random ones), pictures, pages and results.
NOT_OF_THE_PACK = {".safetensors", ".png", ".jpg"}
PAGES = {"docs", "example_workflows"}


def requirements(packages):
    """Return `packages` as pip's requirements, each at the version that tools/constraints.txt names.

    Raises LookupError for one without.
    """
    versions = dict(line.split("==") for line in comfyui.CONSTRAINTS.read_text().splitlines() if not line.startswith("#"))
    if unknown := sorted(set(packages) - set(versions)):
        raise LookupError(f"tools/constraints.txt has no version of {', '.join(unknown)}")
    return [f"{name}=={versions[name]}" for name in packages]


def tracked_files(root):
    """Return the files below `root` that git tracks and the GPU's tests and tables can need, as relative paths."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True).stdout
    paths = [pathlib.Path(name) for name in listed.split("\0") if name]
    kept = [path for path in paths if path.suffix not in NOT_OF_THE_PACK and path.parts[0] not in PAGES]
    return [path for path in kept if (root / path).is_file()]  # one that was deleted is tracked until that is committed


def host_files(folder):
    """Return the host's own files, as relative paths."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in paths if path.parts[0] not in NOT_OF_THE_HOST and "__pycache__" not in path.parts]


def install_packages(folder):
    """Install the packages for the other machine's Python into `folder`, and take out what no such machine uses."""
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
    """Take the owner out of an archive's entry."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def write_archive(kit, name, folder, files):
    """Write `files` of `folder` into the kit's archive `name`, in which they lie in a folder of that name."""
    with tarfile.open(kit / f"{name}.tar.xz", "w:xz", preset=9) as archive:
        for path in files:
            archive.add(folder / path, f"{name}/{path.as_posix()}", filter=nameless)


def make(kit):
    """Write the kit's archives and its run.py into the folder `kit`, in place of older ones."""
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
    """Print the size of the kit's files. Raises ValueError where they are more than LIMIT together."""
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
