"""The example workflows: in the template browser's list, checked against the server's nodes, and run."""

import copy
import io
import json

import comfyui
import numpy as np
import pytest
import requests
import server
from PIL import Image
from ui_workflow import problems

FOLDER = comfyui.ROOT / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
LOADERS = {"CheckpointLoaderSimple", "UNETLoader", "DualCLIPLoader", "VAELoader"}
LAYERS = ["output_blocks.7.0.skip_connection", "middle_block.1.proj_in"]  # first a small one with a large error
SAVED = ("iec_test_w8a8", "iec_test_cache")


def read(path):
    """Return the workflow in a file, with names of saved and loaded files of these tests' own, because the server is shared."""
    return json.loads(path.read_text().replace("iec_example_", "iec_test_"))


def ui_workflow(name):
    return read(FOLDER / f"{name}.json")


def api_workflow(name):
    return read(FOLDER / "api" / f"{name}.json")


def of_type(workflow, kind):
    """Return the (only) node id of this type."""
    (found,) = [name for name, node in workflow.items() if node["class_type"] == kind]
    return found


def with_fewer_steps(workflow, steps=3):
    """Return the workflow with these steps in every run, all of them corrected if some are.

    Images have half the size if there is no mask. If weights are calibrated, only those of two layers are.
    """
    workflow = copy.deepcopy(workflow)
    if not any("mask" in node["class_type"].lower() for node in workflow.values()):
        for node in workflow.values():
            if node["class_type"].startswith("Empty"):
                node["inputs"].update(width=16, height=16)
    for node in workflow.values():
        inputs = node["inputs"]
        if "steps" in inputs and not isinstance(inputs["steps"], list):
            inputs["steps"] = steps
        if str(inputs.get("correction_steps", "none")).startswith("steps:"):
            inputs["correction_steps"] = "all"
        if node["class_type"] == "IECCalibrateWeights":
            inputs["include"] = " ".join(LAYERS)
    return workflow


@pytest.fixture(scope="module")
def host(shared_server):
    """Return a server with the files that the workflows load: dummy models, an image, and what calibrate_and_save saves."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    files = {"image": ("example.png", picture.getvalue())}
    requests.post(f"{shared_server.url}/upload/image", files=files, timeout=60).raise_for_status()
    shared_server.run(with_fewer_steps(api_workflow("calibrate_and_save")))
    return shared_server


@pytest.fixture(scope="module")
def info(host):
    return host.get("/object_info")


def test_template_browser_lists_them_with_a_picture_each(host):
    assert sorted(host.get("/workflow_templates")[comfyui.PACK]) == NAMES
    for name in NAMES:
        answer = requests.get(f"{host.url}/api/workflow_templates/{comfyui.PACK}/{name}.jpg", timeout=60)
        assert answer.status_code == 200, name
        assert len(answer.content) <= 60_000, name
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.format == "JPEG", name
            assert min(picture.size) >= 300, name
            assert np.asarray(picture.convert("L")).std() > 10, name


def test_every_node_has_a_picture_for_its_help_page(info):
    folder = comfyui.ROOT / "web/docs/images"
    assert {path.stem for path in folder.glob("*.png")} >= {name for name in info if name.startswith("IEC")}
    assert all(path.stat().st_size <= 60_000 for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_nodes_inputs_links_and_values_are_valid_on_the_server(info, name):
    assert problems(ui_workflow(name), info) == []


@pytest.mark.parametrize("name", NAMES)
def test_workflows_have_notes_groups_and_titles(name):
    workflow = ui_workflow(name)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert notes and all(len(note["widgets_values"][0]) > 200 for note in notes)
    assert len(workflow["groups"]) >= 4 and all(group["title"] for group in workflow["groups"])
    assert all(node.get("title") and node["title"] != node["type"] for node in workflow["nodes"])
    packs = {node["type"].startswith("IEC"): node["properties"]["cnr_id"] for node in workflow["nodes"] if node not in notes}
    assert packs == {True: comfyui.PACK, False: "comfy-core"}
    assert "://" not in json.dumps(workflow)


def rename_input(node, workflow):
    node["inputs"][0]["name"] = "modell"


def change_type(node, workflow):
    node["inputs"][0]["type"] = "IMAGE"


def disconnect(node, workflow):
    node["inputs"][0]["link"] = None


def wrong_link_type(node, workflow):
    link = next(link for link in workflow["links"] if link[0] == node["inputs"][0]["link"])
    link[5] = "CLIP"


def wrong_slot(node, workflow):
    link = next(link for link in workflow["links"] if link[0] == node["inputs"][0]["link"])
    link[2] = 1


def unknown_choice(node, workflow):
    node["widgets_values"][node["widgets_values"].index("karras")] = "fast"


def out_of_bounds(node, workflow):
    node["widgets_values"][node["widgets_values"].index(24)] = 0


def no_number(node, workflow):
    node["widgets_values"][node["widgets_values"].index(24)] = "24"


def fewer_values(node, workflow):
    node["widgets_values"].pop()


def more_values(node, workflow):
    node["widgets_values"].append("more")


def unknown_node(node, workflow):
    node["type"] = "IECKSampler2"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (rename_input, "IECKSampler.modell: no such input"),
        (rename_input, "IECKSampler.model: not connected"),
        (change_type, "IECKSampler.model: is a MODEL, not a IMAGE"),
        (disconnect, "IECKSampler.model: not connected"),
        (wrong_link_type, "from a MODEL to a MODEL, and it says CLIP"),
        (wrong_slot, "leads from or to no slot"),
        (unknown_choice, "IECKSampler.scheduler: 'fast' is no choice"),
        (out_of_bounds, "IECKSampler.steps: 0 is out of bounds"),
        (no_number, "IECKSampler.steps: '24' is no INT"),
        (fewer_values, "IECKSampler.lambdas: no value"),
        (more_values, "IECKSampler: ['more'] are values of no widget"),
        (unknown_node, "IECKSampler2: no such node"),
    ],
)
def test_a_damaged_workflow_is_found(info, damage, sentence):
    workflow = ui_workflow("quick_start")
    damage(next(node for node in workflow["nodes"] if node["type"] == "IECKSampler"), workflow)
    assert [found for found in problems(workflow, info) if sentence in found]


@pytest.mark.parametrize("name", [name for name in NAMES if "IECLoad" not in (FOLDER / "api" / f"{name}.json").read_text()])
def test_workflow_for_a_downloaded_model_is_accepted_and_stops_at_the_dummy_file(host, name):
    with pytest.raises(server.Failed) as failure:
        host.run(api_workflow(name))
    assert failure.value.event["node_type"] in LOADERS


def images(host, outputs, node):
    """Return the images that a node shows, as float arrays."""
    return [np.asarray(Image.open(io.BytesIO(host.image(entry))).convert("RGB"), float) for entry in outputs[node]["images"]]


def test_quick_start_runs_unchanged(host):
    workflow = api_workflow("quick_start")
    outputs = host.run(workflow)
    pictures = images(host, outputs, of_type(workflow, "SaveImage"))
    assert [picture.shape for picture in pictures] == [(256, 256, 3)] * 4
    assert all(picture.std() > 20 for picture in pictures)
    report = json.loads(outputs[of_type(workflow, "IECReport")]["text"][0])
    assert (report[0]["label"], report[0]["nfe"]) == ("W8A8 + DeepCache 2", 24)


def test_inpainting_changes_only_the_masked_half(host):
    workflow = with_fewer_steps(api_workflow("builtin_inpaint"))
    outputs = host.run(workflow)
    before, after = (images(host, outputs, of_type(workflow, kind)) for kind in ("PreviewImage", "SaveImage"))
    for first, second in zip(before, after, strict=True):
        assert np.abs(first[:, :128] - second[:, :128]).max() <= 1  # rounding in the saved image
        assert np.abs(first[:, 128:] - second[:, 128:]).mean() > 5


def test_comparison_runs_and_has_one_row_per_run(host):
    workflow = with_fewer_steps(api_workflow("compare_and_plot"))
    outputs = host.run(workflow)
    labels = [node["inputs"]["label"] for node in workflow.values() if node["class_type"] == "IECKSampler"]
    rows = outputs[of_type(workflow, "IECCompare")]["text"][0].splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == labels
    for kind in ("IECErrorPlot", "IECParetoPlot", "IECImageGrid"):
        assert images(host, outputs, of_type(workflow, kind))[0].std() > 20


def test_saved_files_are_loaded_and_sampled(host):
    workflow = with_fewer_steps(api_workflow("load_and_sample"))
    files = [value for node in workflow.values() for name, value in node["inputs"].items() if name.endswith("_name")]
    assert [f"{name}.safetensors" in files for name in SAVED] == [True] * 2
    pictures = images(host, host.run(workflow), of_type(workflow, "SaveImage"))
    assert len(pictures) == 4 and all(picture.std() > 5 for picture in pictures)


def test_mixed_precision_is_shown_compared_and_saved(host):
    workflow = with_fewer_steps(api_workflow("less_memory"))
    outputs = host.run(workflow)
    table = outputs[of_type(workflow, "PreviewAny")]["text"][0].splitlines()
    assert [row.split(" | ")[:2] for row in table[2:4]] == [[f"| {LAYERS[0]}", "8 bits"], [f"| {LAYERS[1]}", "4 bits"]]
    rows = [row.split(",") for row in outputs[of_type(workflow, "IECCompare")]["text"][0].splitlines()[1:]]
    assert [row[0] for row in rows] == ["full precision", "4 and 8 bits"]
    assert float(rows[0][4]) == 0 < float(rows[1][4]) < 0.05
    assert images(host, outputs, of_type(workflow, "IECImageGrid"))[0].std() > 20
    told = outputs[of_type(workflow, "IECSaveQuantizedModel")]["text"][0]
    assert told == "models/diffusion_models/iec_test_mixed.safetensors"


def test_found_settings_sample_another_prompt_and_are_kept_for_another_seed(host):
    workflow = with_fewer_steps(api_workflow("find_settings"), steps=8)
    outputs, search = host.run(workflow), of_type(workflow, "IECFindSettings")
    verdict, table = (outputs[name]["text"][0] for name, node in workflow.items() if node["class_type"] == "PreviewAny")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    chosen = [row[0] for row in rows if row[-1] == "chosen"]
    assert len(rows) > 3 and len(chosen) == 1 and f"{chosen[0]} at 0." in verdict
    assert len(images(host, outputs, search)) == 1
    found, full = (images(host, outputs, of_type(workflow, kind)) for kind in ("SaveImage", "PreviewImage"))
    assert len(found) == len(full) == 4
    differences = [np.abs(one - other).mean() for one, other in zip(found, full, strict=True)]
    assert 0 < max(differences) < 40, differences
    workflow[of_type(workflow, "PrimitiveInt")]["inputs"]["value"] += 1
    ran = []
    host.run(workflow, lambda kind, data: ran.append(data["node"]) if kind == "executing" else None)
    assert search not in ran and of_type(workflow, "SaveImage") in ran
