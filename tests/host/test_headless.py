"""The pack without a browser: the example client of example_workflows/api on a running ComfyUI."""

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
import time

import comfyui
import pytest
import server

API = comfyui.ROOT / "example_workflows/api"


@pytest.fixture
def host(shared_server):
    return shared_server


def run(host, workflow, folder):
    """Run the client as a user does; return its finished process."""
    address = host.url.removeprefix("http://")
    command = [sys.executable, str(API / "run.py"), str(workflow), str(folder), "--server", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def changed(tmp_path, **inputs):
    """Return a copy of the example workflow with other inputs, {node: {input: value}}."""
    workflow = json.loads((API / "corrected_image.json").read_text())
    for node, values in inputs.items():
        workflow[node]["inputs"].update(values)
    (tmp_path / "changed.json").write_text(json.dumps(workflow))
    return tmp_path / "changed.json"


def test_client_shows_steps_and_saves_the_images(host, tmp_path):
    # Not the example's own seed: the server may have run that prompt already, and would not run it again.
    fewer = changed(tmp_path, sampler={"seed": 20, "steps": 10}, fast={"schedule": "uniform"})
    done = run(host, fewer, tmp_path / "images")
    assert done.returncode == 0, done.stderr
    written = sorted((tmp_path / "images").iterdir())
    assert done.stdout.split() == [str(path) for path in written]
    assert len(written) == 4 and all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    shown = [line.strip() for line in done.stderr.replace("\r", "\n").splitlines()]
    told = [line for line in shown if line.startswith("corrected, IEC ")]
    # Every second step is evaluated in full, and this evaluation was already made ahead, in the step before.
    steps = [f"step {step} of 10, {step + (step % 2 == 0 and 0 < step < 10)} evaluations" for step in range(11)]
    assert [line.partition(": ")[2] for line in told] == steps


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_headless_page_posts_the_workflow_with_curl(host):
    text = (comfyui.ROOT / "docs/headless.md").read_text(encoding="utf-8")
    command = re.search(r"^    curl -X POST.*?\n\n", text, re.MULTILINE | re.DOTALL)[0]
    command = command.replace("127.0.0.1:8188", host.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", command], cwd=comfyui.ROOT, capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    assert answer["prompt_id"] and answer["node_errors"] == {}
    while answer["prompt_id"] not in host.get("/history"):  # its prompt must end before the server's next tests
        host.interrupt()
        time.sleep(0.1)


def test_client_prints_a_refusal_once(host, tmp_path):
    done = run(host, changed(tmp_path, sampler={"correction_steps": "middle"}), tmp_path / "images")
    assert done.returncode != 0
    forms = "auto, all, none, full, ends:1/10, first:1/5, first:3, last:1/5, last:3 or steps:0,1,48,49"
    assert done.stderr.strip() == (f"IECKSampler (sampler): correction_steps: 'middle' is not a known form; write {forms}.")


def test_client_prints_a_nodes_error(host, tmp_path):
    done = run(host, changed(tmp_path, fast={"branch": 50}), tmp_path / "images")
    assert done.returncode != 0 and not (tmp_path / "images").exists()
    assert done.stderr.strip() == "IECDeepCache (fast): branch: 50 is not possible with this U-Net; choose -1 to 7."


def test_client_accepts_a_url_and_names_a_missing_node(host, tmp_path):
    (tmp_path / "other.json").write_text('{"1": {"class_type": "NoSuchNode", "inputs": {}}}')
    command = [sys.executable, str(API / "run.py"), str(tmp_path / "other.json"), str(tmp_path), "--server", f"{host.url}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "NoSuchNode" in done.stderr
    assert not set("{}") & set(done.stderr) and len(done.stderr.strip().splitlines()) == 1


def test_client_reports_a_server_that_is_not_comfyui(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        command = [sys.executable, str(API / "run.py"), str(API / "corrected_image.json"), str(tmp_path)]
        place = f"127.0.0.1:{other.server_port}"
        done = subprocess.run([*command, "--server", place], capture_output=True, text=True, timeout=60)
        other.shutdown()
    assert done.returncode != 0 and done.stderr.startswith(f"What answers at {place} is no ComfyUI")


def without_a_server(*arguments):
    """Run the client without a server; return the sentence with which it ended."""
    address = f"127.0.0.1:{server.free_port()}"
    command = [sys.executable, str(API / "run.py"), *map(str, arguments), "--server", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr.replace(address, "HERE")


def test_client_reports_that_no_server_answers(tmp_path):
    said = without_a_server(API / "corrected_image.json", tmp_path)
    assert said.startswith("No ComfyUI answers at HERE: start it, or name another with --server host:port.")


@pytest.mark.parametrize(
    "text", [(API.parent / "quick_start.json").read_text(), "null", "3", "[1]", '{"1": 2}', '{"nodes": []}']
)
def test_client_refuses_files_not_in_api_form(tmp_path, text):
    (tmp_path / "saved.json").write_text(text)
    said = without_a_server(tmp_path / "saved.json", tmp_path)
    assert said.startswith(
        f"{tmp_path / 'saved.json'}: this is not a workflow in API form; in ComfyUI, open it and take Export"
    )


def test_client_refuses_files_that_are_not_json(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    assert without_a_server(tmp_path / "broken.json", tmp_path).startswith(f"{tmp_path / 'broken.json'}: this is not JSON (")
