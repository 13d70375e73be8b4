"""The demonstration of `make demo`: run the comparison workflow on a headless ComfyUI, over its API.

    python tools/demo.py [--workflow FILE] [--output FOLDER] [--seed N] [--steps N]

Leaves `grid.png`, `error_growth.png` and `table.csv` in the output folder. Then runs the workflow find_settings, and prints
which settings have the least error in half of the time on this machine.
"""

import argparse
import copy
import csv
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import comfyui
import pack
import server
from tqdm import tqdm


def samplers(workflow):
    """Return the input dictionaries of the workflow's IECKSampler nodes."""
    return [node["inputs"] for node in workflow.values() if node["class_type"] == "IECKSampler"]


def with_settings(workflow, **settings):
    """Return a copy of the workflow in which every sampler has these inputs; None leaves an input unchanged."""
    workflow = copy.deepcopy(workflow)
    for inputs in samplers(workflow):
        inputs.update({name: value for name, value in settings.items() if value is not None})
    return workflow


def with_shorter_calibrations(workflow, steps):
    """Return a copy of the workflow in which calibration runs have at most this many steps; None leaves them unchanged."""
    workflow = copy.deepcopy(workflow)
    for node in workflow.values():
        if steps is not None and node["class_type"] == "IECCalibrateWeights":
            node["inputs"]["steps"] = min(steps, node["inputs"]["steps"])
    return workflow


def promised_evaluations(workflow):
    """Return the most evaluations that the workflow's samplers will take in total, for heun and for samplers with one
    evaluation per step.
    """
    correction, schedule = pack.load("iec_core.correction.iteration"), pack.load("iec_core.correction.correction_steps")
    names = ("correction_steps", "lambda_", "max_iterations", "tolerance", "evaluation_point")
    total = 0
    for inputs in samplers(workflow):
        settings = correction.CorrectionSettings.parse(**{name: inputs[name] for name in names if name in inputs})
        if settings.is_auto:
            settings = dataclasses.replace(settings, steps=schedule.parse_correction_steps("all"), evaluation_point="ahead")
        sigmas = [1.0] * inputs["steps"] + [0.0]  # only the final zero matters here
        corrected = settings.corrected_steps(sigmas, known_ends=frozenset(range(inputs["steps"] - 1)))
        of_its_own = 2 * inputs["steps"] - 1 if inputs["sampler_name"] == "heun" else inputs["steps"]
        total += of_its_own + settings.added_evaluations * len(corrected)
    return total


class Progress:
    """A progress bar of evaluations over all runs of a workflow, driven by the pack's `iec.step` events."""

    def __init__(self, total):
        self._bar = tqdm(total=total, unit=" NFE", dynamic_ncols=True)
        self._done = {}

    def on_event(self, kind, data):
        """Handle a websocket message."""
        if kind == "iec.step":
            self._done[data["node"]] = data["nfe"]
            name = f"{data['label']}, IEC {data['correction']}, step {data['step']}/{data['steps']}"
            self._bar.set_description(name, refresh=False)
            self._bar.update(sum(self._done.values()) - self._bar.n)

    def close(self):
        """Stop the bar at its current position."""
        self._bar.close()


def print_table(rows):
    """Print rows of text in aligned columns, words to the left and numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def run(host, workflow, output):
    """Run the workflow, write its three results into `output`, and print the table."""
    system = host.get("/system_stats")
    print(f"ComfyUI {system['system']['comfyui_version']} on {system['devices'][0]['name']}", flush=True)
    # Warm-up, so that no run's seconds include a first use. The host keeps the calibration results for the runs.
    print("Calibrating and warming up ...", flush=True)
    host.run(with_settings(workflow, steps=2, correction_steps="all"))
    progress = Progress(promised_evaluations(workflow))
    try:
        outputs = host.run(workflow, progress.on_event)
    finally:
        progress.close()
    output.mkdir(parents=True, exist_ok=True)
    for node, file in (("grid", "grid.png"), ("error_plot", "error_growth.png")):
        (output / file).write_bytes(host.image(outputs[node]["images"][0]))
    table = outputs["table"]["text"][0]
    (output / "table.csv").write_text(table)
    print_table(list(csv.reader(table.splitlines())))
    print(f"\nWritten to {output}: grid.png, error_growth.png, table.csv")


def find_settings(host, steps=None):
    """Run the workflow find_settings, and print the verdict. steps: those of its full run, None for the workflow's."""
    print("\nFind Settings (IEC) measures what else halves the time ...", flush=True)
    workflow = json.loads((comfyui.ROOT / "example_workflows/api/find_settings.json").read_text())
    (name,) = [name for name, node in workflow.items() if node["class_type"] == "IECFindSettings"]
    workflow[name]["inputs"]["steps"] = steps or workflow[name]["inputs"]["steps"]
    print(host.run(workflow)[name]["text"][0].split("\n")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = comfyui.ROOT / "example_workflows/api/compare_variants.json"
    parser.add_argument("--workflow", type=pathlib.Path, default=default, help="API workflow with the node ids of the default")
    parser.add_argument("--output", type=pathlib.Path, default=comfyui.ROOT / "output")
    parser.add_argument("--seed", type=int, help="seed of every run; default: the workflow's")
    parser.add_argument("--steps", type=int, help="steps of every run; default: the workflow's")
    arguments = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT is ignored in a background job
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds the stack, and so stops the server
    workflow = with_settings(json.loads(arguments.workflow.read_text()), seed=arguments.seed, steps=arguments.steps)
    workflow = with_shorter_calibrations(workflow, arguments.steps)
    try:
        with server.serve() as host:
            run(host, workflow, arguments.output)
            find_settings(host, arguments.steps)
    except KeyboardInterrupt:
        return "interrupted; ComfyUI was stopped"
    except (
        server.Refused,
        server.Failed,
        subprocess.CalledProcessError,
        OSError,
        RuntimeError,
    ) as error:
        return f"the demonstration failed: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main())
