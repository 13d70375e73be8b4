"""Do the work of `make gpu` from a kit that `make gpu-kit` made, without a network: the GPU's tests, then its tables.

    python run.py                      with a Python 3.12 that has torch 2.11, transformers, aiohttp, scipy and pytest
    python run.py --size small         options are passed to tools/gpu_tables.py

In the kit this file is `run.py`, next to the archives, which it unpacks into a temporary folder. The output of the tests and
the tables goes to the folder that the environment variable OUT names, else to `results` in the current folder. It is written
continuously, so that an interrupted run leaves what it had. The tables are made even if tests fail; the exit status is 1 if
anything failed.
"""

import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

KIT = pathlib.Path(__file__).resolve().parent


def unpack(kit, folder):
    """Unpack every archive of the kit; each contains a folder of the same name."""
    for archive in sorted(kit.glob("*.tar.xz")):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")


def environment(folder, inherited):
    """Return the environment variables with which the unpacked pack finds its host and its packages, and installs nothing."""
    paths = [folder / "site", folder / "stand_ins", *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "COMFYUI_DIR": str(folder / "host"),
        "IEC_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",  # for transformers, which the host imports
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # this Python may have plugins that were never tested with the pack
        "PYTHONUNBUFFERED": "1",
    }


def lay_out(kit, folder, results):
    """Unpack the kit into `folder`, and make the pack's docs/gpu there a link to the folder `results`."""
    unpack(kit, folder)
    (folder / "pack" / "docs").mkdir()
    (folder / "pack" / "docs" / "gpu").symlink_to(results, target_is_directory=True)


def run(log, command, **settings):
    """Run Python with the arguments `command`, show its output and write it to the file `log`; return its exit status."""
    print(f"$ python {' '.join(command)}", flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with log.open("w") as file, subprocess.Popen([sys.executable, *command], **pipes, **settings) as process:
        for line in process.stdout:
            for stream in (sys.stdout, file):
                print(line, end="", file=stream, flush=True)
    return process.returncode


def main(options):
    """Run the tests and then the tables, with `options` for the tables; return the exit status."""
    results = pathlib.Path(os.environ.get("OUT") or "results").resolve()
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-kit-") as folder:
        folder = pathlib.Path(folder)
        lay_out(KIT, folder, results)
        settings = {"cwd": folder / "pack", "env": environment(folder, os.environ)}
        tables = ["tools/gpu_tables.py", "--output", "docs/gpu", *options]
        commands = {"tests": ["-m", "pytest", "tests/gpu"], "tables": tables}
        failed = [name for name, command in commands.items() if run(results / f"{name}.log", command, **settings)]
    print(f"What came out is in {results}.", f"These failed: {', '.join(failed)}." if failed else "Nothing failed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
