"""The pack on a running ComfyUI, over its HTTP and websocket API."""

import io
import json
import re
import signal
import subprocess
import sys
import time

import comfyui
import numpy as np
import psutil
import pytest
import requests
import server
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

NODES = {
    "IECKSampler", "IECApply", "IECSampler", "IECQuantizeModel", "IECDeepCache", "IECLoadBuiltinModel", "IECClassLabel",
    "IECJoinReports", "IECCompare", "IECReport", "IECCalibrateCacheQuant", "IECSaveCacheProfile", "IECLoadCacheProfile",
    "IECCacheQuant", "IECSaveQuantizedModel", "IECLoadQuantizedModel", "IECCalibrateQuantization", "IECSaveQuantizationProfile",
    "IECLoadQuantizationProfile", "IECApplyQuantizationProfile", "IECQuantizationReport", "IECErrorPlot", "IECImageGrid",
    "IECParetoPlot", "IECContractionProbe", "IECCalibrateWeights", "IECFindSettings",
}  # fmt: skip


STOCK_INPUTS = (
    "model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image", "denoise",
)  # fmt: skip
W8A8 = {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def host(output):
    with server.serve(output) as host:
        yield host


def workflow(**settings):
    """Return a prompt: the built-in model, W8A8 and DeepCache, sampled with IEC; the latent is saved. `settings` go to the
    sampler.
    """
    sampler = {
        "model": ["cached", 0], "seed": 5, "steps": 6, "cfg": 2.0, "sampler_name": "ddim", "scheduler": "normal",
        "positive": ["face", 0], "negative": ["none", 0], "latent_image": ["empty", 0], "denoise": 1.0,
        "correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5, **settings,
    }  # fmt: skip
    nodes = {
        "model": ("IECLoadBuiltinModel", {"precision": "auto"}),
        "quantized": (
            "IECQuantizeModel",
            {"model": ["model", 0], "weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True},
        ),
        "cached": ("IECDeepCache", {"model": ["quantized", 0], "interval": 3, "branch": 0}),
        "face": ("IECClassLabel", {"labels": "face"}),
        "none": ("IECClassLabel", {"labels": "none"}),
        "empty": ("EmptyChromaRadianceLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
        "sampler": ("IECKSampler", sampler),
        "save": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "iec"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def saved_latent(output, outputs):
    entry = outputs["save"]["latents"][0]
    return load_file(output / entry["subfolder"] / entry["filename"])["latent_tensor"]


def test_pack_loads_without_warnings(host):
    info = host.get("/object_info")
    assert set(info) >= NODES
    assert {name for name in info if name.startswith("IEC")} == NODES
    for name in NODES:
        inputs = info[name]["input"]
        described = {**inputs.get("required", {}), **inputs.get("optional", {})}
        assert info[name]["description"] and info[name]["category"].endswith("/IEC")
        assert all(spec[1].get("tooltip") for spec in described.values()), name
        assert all(info[name]["output_tooltips"]), name
    log = host.log.read_text(errors="replace")
    assert "IMPORT FAILED" not in log
    assert not [line for line in log.splitlines() if "warn" in line.lower() and comfyui.PACK in line]


def test_sampler_has_the_stock_inputs_followed_by_its_own(host):
    info = host.get("/object_info")
    stock, ours = (info[name]["input"]["required"] for name in ("KSampler", "IECKSampler"))
    assert list(ours) == [*stock, "correction_steps", "lambda_", "max_iterations", "tolerance"]
    for name, (kind, *_) in stock.items():
        if name in ("sampler_name", "scheduler"):
            assert choices(ours[name]) == choices(stock[name])
        else:
            assert ours[name][0] == kind


def choices(spec):
    """Return the options of a combo input: older hosts list them instead of the type."""
    return spec[0] if isinstance(spec[0], list) else spec[1]["options"]


def test_help_pages_are_served_and_name_every_input(host):
    info = host.get("/object_info")
    for name in NODES:
        answer = requests.get(f"{host.url}/extensions/{comfyui.PACK}/docs/{name}.md", timeout=60)
        assert answer.status_code == 200, name
        inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
        own = set(inputs) - (set(info["KSampler"]["input"]["required"]) if name == "IECKSampler" else set())
        assert [key for key in own if f"`{key}`" not in answer.text] == [], name
        assert answer.text.startswith(f"# {info[name]['display_name']}\n"), name


def test_help_page_lists_the_classes_of_the_model():
    text = " ".join((comfyui.ROOT / "web/docs/IECClassLabel.md").read_text().split())
    with safe_open(comfyui.ROOT / "nodes/assets/emoji32.safetensors", "pt") as file:
        assert ", ".join(json.loads(file.metadata()["iec.classes"])) in text


def events_of(host, prompt, *kinds):
    """Run a prompt; return the data of its events of these kinds, in order."""
    events = []
    host.run(prompt, lambda kind, data: events.append(data) if kind in kinds else None)
    return events


def test_events_have_step_and_evaluations(host):
    events = events_of(host, workflow(label="events", seed=11), "iec.step")
    assert [(event["step"], event["nfe"]) for event in events] == [(i, 2 * i) for i in range(7)]
    for event in events:
        assert (event["node"], event["label"], event["correction"], event["steps"]) == ("sampler", "events", "all", 6)
        assert event["source"] == "sampler"
    assert (events[0]["corrected"], events[0]["full"]) == ([0, 1, 2, 3, 4, 5], [0, 3])


def test_events_have_the_corrections_of_each_step(host):
    """The events contain the batch means of the report, each step as soon as it is over, and all steps at the end."""
    prompt = workflow(label="events", seed=12, correction_steps="steps:1,3", max_iterations=2)
    prompt["report"] = {"class_type": "IECReport", "inputs": {"report": ["sampler", 1]}}
    prompt["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}}
    events, runs = [], []

    def note(kind, data):
        events.extend([data] if kind == "iec.step" else [])
        runs.extend([data] if kind == "iec.run" else [])

    report = json.loads(host.run(prompt, note)["text"]["text"][0])[0]
    told = [[step["step"] for step in event["iterated"]] for event in events]
    assert told == [[], [], [1], [], [3], [], []]
    (run,) = runs
    assert run["iterated"] == [step for event in events for step in event["iterated"]]
    assert (run["nfe"], run["seconds"], run["warnings"]) == (report["nfe"], report["seconds"], report["warnings"])
    for step in run["iterated"]:
        for name in ("residuals", "lambdas"):
            means = [sum(row) / len(row) for row in report["steps"][step["step"]][name]]
            assert step[name] == pytest.approx(means), name
        assert step["fell_back"] == any(report["steps"][step["step"]]["fell_back"])


def test_events_name_the_correcting_node_and_the_cached_steps(host):
    prompt = workflow(seed=13, steps=5)
    stock = {name: value for name, value in prompt["sampler"]["inputs"].items() if name in STOCK_INPUTS}
    prompt["cache"] = {"class_type": "IECDeepCache", "inputs": {"model": ["model", 0], "interval": 3, "branch": 0}}
    prompt["cache"]["inputs"]["schedule"] = "uniform"
    settings = {"correction_steps": "first:1", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    prompt["iec"] = {"class_type": "IECApply", "inputs": {"model": ["cache", 0], **settings}}
    prompt["sampler"] = {"class_type": "KSampler", "inputs": {**stock, "model": ["iec", 0]}}
    first, *between, last = events_of(host, prompt, "iec.step", "iec.run")
    assert len(between) == 5
    for event in (first, last):
        assert (event["corrected"], event["full"]) == ([0], [0, 3])
    for event in (first, *between, last):
        assert (event["node"], event["source"]) == ("sampler", "iec")
    assert not any({"corrected", "full"} & set(event) for event in between)  # a long run's lists are sent only twice


def test_events_name_the_node_that_is_in_the_prompt(host):
    """It must not be a node with the same inputs in an earlier prompt, whose result the server still has."""

    def sources(name, seed):
        prompt = workflow(seed=seed, steps=2)
        stock = {key: value for key, value in prompt["sampler"]["inputs"].items() if key in STOCK_INPUTS}
        settings = {"correction_steps": "first:1", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.25}
        prompt[name] = {"class_type": "IECApply", "inputs": {"model": stock["model"], **settings}}
        prompt["sampler"] = {"class_type": "KSampler", "inputs": {**stock, "model": [name, 0]}}
        return {event["source"] for event in events_of(host, prompt, "iec.run")}

    assert sources("10", 21) == {"10"}
    assert sources("77", 22) == {"77"}


@pytest.mark.parametrize(
    "about", [{}, {"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": None}}, {"extra_pnginfo": {"workflow": [1]}}]
)
def test_a_prompt_with_malformed_workflow_data_runs(host, about):
    prompt = workflow(seed=len(str(about)), steps=1)
    body = {"prompt": prompt, "client_id": "odd", "extra_data": about}
    number = requests.post(f"{host.url}/prompt", json=body, timeout=60).json()["prompt_id"]
    deadline = time.monotonic() + 60
    while not (done := host.get(f"/history/{number}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert done[number]["status"]["status_str"] == "success"


def test_server_answers_requests_for_a_step_plan(host):
    sampling = {"steps": 20, "sampler_name": "heun", "scheduler": "normal", "denoise": 1.0}
    question = {"correction": {"correction_steps": "ends:1/10"}, "sampling": sampling}
    question["cache"] = {"interval": 5, "schedule": "uniform"}
    answer = requests.post(f"{host.url}/iec/step_plan", json=question, timeout=60).json()
    assert (answer["corrected"], answer["full"]) == ([0, 1, 18, 19], [0, 5, 10, 15])
    assert (answer["evaluations"], answer["nfe"]) == (39, 43)
    refused = requests.post(f"{host.url}/iec/step_plan", data="nonsense", timeout=60)
    assert refused.status_code == 400 and refused.json()["unknown"].startswith("question: it is not JSON")


def test_report_of_a_patched_model_waits_for_its_runs(host):
    """Apply IEC's report has the runs of the prompt that asks, in order: two stock samplers on one model."""

    def graph(seed):
        nodes = workflow()
        stock = {name: value for name, value in nodes["sampler"]["inputs"].items() if name in STOCK_INPUTS}
        settings = {"correction_steps": "last:1", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
        nodes["iec"] = {"class_type": "IECApply", "inputs": {"model": ["model", 0], **settings}}
        first = {**stock, "model": ["iec", 0], "seed": seed, "steps": 3}
        second = {**first, "latent_image": ["sampler", 0], "steps": 4, "denoise": 0.5}
        nodes["sampler"] = {"class_type": "KSampler", "inputs": first}
        nodes["second"] = {"class_type": "KSampler", "inputs": second}
        nodes["report"] = {"class_type": "IECReport", "inputs": {"report": ["iec", 1], "after": ["second", 0]}}
        nodes["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 0]}}
        return nodes

    for seed in (1, 2):
        runs = json.loads(host.run(graph(seed))["text"]["text"][0])
        assert [(run["label"], run["nfe"], len(run["steps"])) for run in runs] == [("run 1", 4, 3), ("run 2", 5, 4)]


def pictures(seed, **nodes):
    """Return two runs of the built-in model, joined and with a VAE, and further `nodes`: {name: (class, inputs)}."""
    graph = workflow(model=["model", 0], seed=seed, steps=3, correction_steps="none", keep_latents=True)
    del graph["save"]
    sampler = graph["sampler"]
    graph["corrected"] = {**sampler, "inputs": {**sampler["inputs"], "correction_steps": "all", "label": "corrected"}}
    join = {"reports": ["sampler", 1], "more": ["corrected", 1]}
    more = {"runs": ("IECJoinReports", join), "vae": ("VAELoader", {"vae_name": "pixel_space"}), **nodes}
    return graph | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in more.items()}


@pytest.mark.parametrize(
    ("node", "inputs", "images", "text"),
    [
        ("IECErrorPlot", {"reports": ["runs", 0]}, 1, None),
        ("IECImageGrid", {"reports": ["runs", 0], "vae": ["vae", 0], "difference_gain": 4.0}, 1, None),
        ("IECParetoPlot", {"reports": ["runs", 0], "cost": "evaluations"}, 1, None),
        ("IECCompare", {"reports": ["runs", 0], "vae": ["vae", 0]}, 3, "variant,correction_steps"),
        ("IECReport", {"report": ["corrected", 1]}, 1, '[\n {\n  "label": "corrected"'),
    ],
)
def test_nodes_show_their_pictures_and_pass_them_on(host, node, inputs, images, text):
    """The node shows the pictures, also if it is the prompt's only output or cached; connected nodes get them too."""
    seed = sum(map(ord, node))
    alone = host.run(pictures(seed, shown=(node, inputs)))["shown"]
    assert len(alone["images"]) == images and all(entry["type"] == "temp" for entry in alone["images"])
    assert alone["text"][0].startswith(text) if text else "text" not in alone
    slot = 1 if node == "IECReport" else 0
    saved = pictures(seed, shown=(node, inputs), save=("PreviewImage", {"images": ["shown", slot]}))
    outputs = host.run(saved)
    assert [entry["filename"] for entry in outputs["shown"]["images"]] == [entry["filename"] for entry in alone["images"]]
    (passed_on,) = outputs["save"]["images"]
    decoded = [np.asarray(Image.open(io.BytesIO(host.image(entry)))) for entry in (alone["images"][0], passed_on)]
    assert np.array_equal(*decoded)


@pytest.mark.parametrize(
    ("node", "inputs", "sentence"),
    [
        ("IECParetoPlot", {"cost": "money"}, "cost: 'money' is none of seconds, evaluations"),
        ("IECImageGrid", {"vae": ["vae", 0], "difference_gain": 0.5}, "Value 0.5 smaller than min of 1.0: difference_gain"),
        ("IECImageGrid", {"vae": ["vae", 0], "difference_gain": 101}, "Value 101.0 bigger than max of 100.0: difference_gain"),
    ],
)
def test_pictures_refuse_bad_settings_at_validation(host, node, inputs, sentence):
    with pytest.raises(server.Refused, match=sentence):
        host.run(pictures(1, shown=(node, {"reports": ["runs", 0], **inputs})))


FORMS = "auto, all, none, full, ends:1/10, first:1/5, first:3, last:1/5, last:3 or steps:0,1,48,49"
BAD = [
    ({"correction_steps": "middle"}, f"correction_steps: 'middle' is not a known form; write {FORMS}."),
    ({"correction_steps": "steps:0,6"}, "correction_steps: 'steps:0,6' names step 6, but the run has 6 steps"),
    ({"lambda_": 0.0}, "lambda_: 0.0 is out of range"),
    ({"lambda_": 1.5}, "lambda_: 1.5 is outside 0 to 1."),
    ({"steps": 0}, "steps: 0 is outside 1 to 10000"),
    ({"scheduler": "fast"}, "scheduler: 'fast' is none of simple"),
    ({"sampler_name": "fast"}, "sampler_name: 'fast' is none of euler"),
    ({"sampler_name": "euler_cfg_pp"}, "sampler_name: euler_cfg_pp uses the unguided prediction"),
    ({"evaluation_point": "middle"}, "evaluation_point: 'middle' is none of paper, next"),
    ({"lambda_": "x"}, 'lambda_: "x" is not a finite number from 0 to 1'),
    ({"steps": "x"}, 'steps: "x" is not a whole number from 1 to 10000'),
    ({"max_iterations": -1}, "max_iterations: -1 is outside 0 to 100."),
    ({"tolerance": -1.0}, "Value -1.0 smaller than min of 0.0: tolerance"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD)
def test_bad_input_is_refused_at_validation_and_the_next_prompt_works(host, output, settings, sentence):
    with pytest.raises(server.Refused) as refusal:
        host.run(workflow(**settings))
    assert refusal.value.status == 400
    assert sentence in str(refusal.value)
    seed = 1000 + BAD.index((settings, sentence))
    assert torch.isfinite(saved_latent(output, host.run(workflow(steps=1, seed=seed)))).all()


@pytest.mark.parametrize(
    ("node", "name", "value", "choices"),
    [
        ("quantized", "weight_bits", "3", "8, 4, fp8"),
        ("quantized", "activation_bits", "7", "8, 16"),
        ("model", "precision", "float8", "auto, float32, bfloat16, float16"),
    ],
)
def test_unknown_choice_is_refused_at_validation(host, node, name, value, choices):
    bad = workflow()
    bad[node]["inputs"][name] = value
    with pytest.raises(server.Refused, match=rf"{name}: '{value}' is none of {choices}\."):
        host.run(bad)


def test_bad_label_is_refused_at_validation(host):
    bad = workflow()
    bad["face"]["inputs"]["labels"] = "face, horse"
    with pytest.raises(server.Refused, match="labels: 'horse' is not a class of the built-in model; write none or one"):
        host.run(bad)


@pytest.mark.parametrize("node", ["IECApply", "IECSampler"])
def test_other_nodes_refuse_at_validation_too(host, node):
    graph = workflow()
    source = {"model": ["model", 0]} if node == "IECApply" else {"sampler": ["select", 0]}
    del graph["save"]  # a valid output would be run, and the prompt accepted because of it
    graph["select"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    settings = {"correction_steps": "sometimes", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5}
    graph["bad"] = {"class_type": node, "inputs": {**source, **settings}}
    graph["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["bad", 0]}}
    with pytest.raises(server.Refused, match="correction_steps: 'sometimes' is not a known form"):
        host.run(graph)


def test_an_error_found_in_the_run_is_one_sentence_and_the_next_prompt_works(host, output):
    bad = workflow()
    bad["cached"]["inputs"]["branch"] = 8
    with pytest.raises(server.Failed, match="branch: 8 is not possible with this U-Net; choose -1 to 7"):
        host.run(bad)
    assert torch.isfinite(saved_latent(output, host.run(workflow(steps=1, seed=77)))).all()


def test_an_interrupted_run_leaves_the_model_unchanged(host, output):
    plain = workflow(model=["model", 0], correction_steps="none", seed=123)
    expected = saved_latent(output, host.run(plain))
    interrupted, steps = [], []

    def interrupt(kind, data):
        if kind == "iec.step" and data["step"] == 20 and not interrupted:
            interrupted.append(True)
            host.interrupt()

    with pytest.raises(server.Failed, match="interrupted"):
        host.run(workflow(steps=500, seed=321), interrupt)
    again = workflow(model=["model", 0], correction_steps="none", seed=123, label="again")  # newer hosts keep older results
    latent = saved_latent(output, host.run(again, lambda kind, data: steps.append(data) if kind == "iec.step" else None))
    assert len(steps) == 7
    assert torch.equal(latent, expected)


def test_a_second_copy_of_the_pack_does_not_load(tmp_path):
    """An older folder may be left in custom_nodes: the server starts, with the nodes, route and extension of the first copy."""
    second = tmp_path / "more" / "an_older_copy"
    second.parent.mkdir()
    second.symlink_to(comfyui.ROOT, target_is_directory=True)
    (tmp_path / "paths.yaml").write_text(json.dumps({"more": {"custom_nodes": str(second.parent)}}))
    arguments = ["--extra-model-paths-config", str(tmp_path / "paths.yaml")]
    arguments += ["--whitelist-custom-nodes", comfyui.PACK, second.name]
    with server.serve(tmp_path / "output", arguments) as host:
        info, log = host.get("/object_info"), host.log.read_text(errors="replace")
        scripts = [path for path in host.get("/extensions") if path.endswith("/iec.js")]
        answer = requests.post(f"{host.url}/iec/step_plan", data="{}", timeout=60)
    first = comfyui.provide() / "custom_nodes" / comfyui.PACK
    told = [line for line in log.splitlines() if "[ComfyUI-IEC]" in line]
    assert len(told) == 1 and str(first) in told[0] and str(second) in told[0] and told[0].endswith("; remove one of them.")
    assert {info[name]["python_module"] for name in NODES} == {f"custom_nodes.{comfyui.PACK}"}
    assert scripts == [f"/extensions/{comfyui.PACK}/js/iec.js"]
    assert answer.json()["unknown"] and "IMPORT FAILED" not in log and "Traceback" not in log


def test_demo_makes_its_table_and_pictures(tmp_path):
    """Run the demo with two images of half the size, in 2 steps, with weights that are calibrated on one image."""
    small = json.loads((comfyui.ROOT / "example_workflows/api/compare_variants.json").read_text())
    small["latent"]["inputs"].update(width=16, height=16, batch_size=2)
    small["positive"]["inputs"]["labels"] = "face, heart"
    small["calibration_latent"]["inputs"].update(width=16, height=16, batch_size=1)
    small["calibration_1"]["inputs"]["labels"] = "hand"
    small["w4a8"]["inputs"]["runs"] = 1
    for name in ("positive_2", "positive_3", "positive_4"):
        del small["w4a8"]["inputs"][name]
    (tmp_path / "small.json").write_text(json.dumps(small))
    command = [sys.executable, str(comfyui.ROOT / "tools/demo.py"), "--workflow", str(tmp_path / "small.json")]
    command += ["--steps", "2", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split(",") for line in (tmp_path / "table.csv").read_text().splitlines()]
    variants = ["full precision", "W8A8", "calibrated W4A8", "DeepCache 5", "W8A8 + DeepCache 5"]
    corrections = [["none", "2"], ["auto", "2"], ["ends:1/10", "4"], ["all next", "3"]]
    expected = [["heun", "none", "3"], *([variant, *correction] for variant in variants for correction in corrections)]
    expected.remove(["full precision", "all next", "3"])  # it is heun
    assert [row[:3] for row in rows[1:]] == expected
    printed = [re.split(" {2,}", line) for line in done.stdout.splitlines()]
    assert all(row in printed for row in rows)
    assert re.search(r"at \d\.\d\d of the time: error \d", done.stdout.splitlines()[-1])
    for name in ("grid.png", "error_growth.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_quantized_model_is_saved_and_loaded_by_a_later_prompt(host, output):
    direct = workflow(correction_steps="none")
    direct["cached"]["inputs"]["interval"] = 1
    expected = saved_latent(output, host.run(direct))
    keep = {"class_type": "IECSaveQuantizedModel", "inputs": {"model": ["quantized", 0], "name": "iec_test_of_files"}}
    told = host.run({name: direct[name] for name in ("model", "quantized")} | {"keep": keep})["keep"]["text"][0]
    assert told == "models/diffusion_models/iec_test_of_files.safetensors"
    path = comfyui.provide() / told
    try:
        load = {"class_type": "IECLoadQuantizedModel", "inputs": {"model_name": path.name}}
        later = {name: node for name, node in direct.items() if name not in ("model", "quantized")} | {"loaded": load}
        later["cached"]["inputs"]["model"] = ["loaded", 0]
        assert torch.equal(saved_latent(output, host.run(later)), expected)
    finally:
        path.unlink()
    with pytest.raises(server.Refused, match=r"model_name: there is no file 'iec_test_of_files\.safetensors'"):
        host.run(later)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stops_its_server_when_it_is_stopped(tmp_path, number):
    command = [sys.executable, str(comfyui.ROOT / "tools/demo.py"), "--output", str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    servers = []
    deadline = time.monotonic() + 120
    try:
        while not servers and time.monotonic() < deadline:
            time.sleep(0.1)
            servers = psutil.Process(demo.pid).children()
        demo.send_signal(number)
        assert demo.wait(60) != 0
    finally:
        demo.terminate()
    assert servers and not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in servers)
