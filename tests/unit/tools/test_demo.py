"""The demonstration's requests to its server."""

import json

import comfyui
import demo

WORKFLOW = json.loads((comfyui.ROOT / "example_workflows/api/compare_variants.json").read_text())


class Recorder:
    """Replace the server; `prompts`: the prompts that it was given."""

    def __init__(self):
        self.prompts = []

    def get(self, path):
        return {"system": {"comfyui_version": "0"}, "devices": [{"name": "none"}]}

    def image(self, entry):
        return b""

    def run(self, workflow, on_event=None):
        self.prompts.append(workflow)
        picture = {"images": [{}]}
        return {"grid": picture, "error_plot": picture, "table": {"text": ["variant,correction_steps\nfull,none"]}}


def test_the_runs_use_the_calibrations_of_the_warm_up(tmp_path):
    """ComfyUI keeps a node's result as long as the inputs of the node, and of the nodes before it, are unchanged.

    A calibration made only for the warm-up would be made twice.
    """
    host = Recorder()
    demo.run(host, WORKFLOW, tmp_path)
    warm_up, runs = host.prompts
    assert runs == WORKFLOW
    wanted, seen = [name for name, node in runs.items() if node["class_type"] == "IECCalibrateWeights"], set()
    assert wanted
    while wanted:
        name = wanted.pop()
        assert warm_up[name] == runs[name], name
        seen.add(name)
        links = (value[0] for value in runs[name]["inputs"].values() if isinstance(value, list))
        wanted += [link for link in links if link not in seen]
    assert {node["inputs"]["steps"] for node in warm_up.values() if node["class_type"] == "IECKSampler"} == {2}


def test_calibrations_take_at_most_the_requested_steps():
    def calibrations(workflow):
        return [node["inputs"]["steps"] for node in workflow.values() if node["class_type"] == "IECCalibrateWeights"]

    (own,) = calibrations(WORKFLOW)
    assert calibrations(demo.with_shorter_calibrations(WORKFLOW, 3)) == [3] and own > 3
    for steps in (None, own, own + 5):
        assert calibrations(demo.with_shorter_calibrations(WORKFLOW, steps)) == [own]
