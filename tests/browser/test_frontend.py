"""The tests' own browser: the frontend is ready in both modes, its errors are seen, and how it handles seeds."""

import concurrent.futures
import threading
import time

import frontend as tool
import pytest


@pytest.fixture
def shares_page():
    return "workflows"


@pytest.mark.usefixtures("fresh_page")
@pytest.mark.parametrize("vue_nodes", [True, False])
def test_frontend_is_ready_with_the_pack_and_nothing_over_the_graph(frontend, vue_nodes):
    page = frontend.page
    assert (
        page.evaluate("() => LiteGraph.vueNodesMode ?? app.ui.settings.getSettingValue('Comfy.VueNodes.Enabled')") is vue_nodes
    )
    frontend.open_api({"model": {"class_type": "IECLoadBuiltinModel", "inputs": {"precision": "float32"}}})
    assert frontend.prompt()["model"]["inputs"] == {"precision": "float32", "architecture": "unet"}
    page.wait_for_timeout(300)
    assert page.locator("[role=dialog]:visible").count() == 0
    assert page.locator(".p-toast-message:visible").count() == 0
    assert page.locator("[data-node-id]").count() == int(vue_nodes)


def test_errors_in_the_page_are_recorded(frontend):
    frontend.page.evaluate("() => { console.error('told'); setTimeout(() => { throw new Error('thrown') }) }")
    for _ in range(100):  # a busy machine may report late
        if len(frontend.errors) < 2:
            frontend.page.wait_for_timeout(100)
    assert [text.splitlines()[0] for text in frontend.errors] == ["told", "uncaught: Error: thrown"]
    frontend.errors.clear()


def test_a_chromium_variable_that_names_no_program_is_refused(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(RuntimeError, match="CHROMIUM names /nowhere/chromium, which is no program"):
        tool.chromium()


def program(path, script):
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("root", [True, False])
def test_apt_installs_a_browser_if_none_is_found(monkeypatch, tmp_path, root):
    """The commands are replaced by scripts that record their calls; apt-get's installs a chromium."""
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tool.os, "geteuid", lambda: 0 if root else 1000)
    (tmp_path / "env").symlink_to("/usr/bin/env")
    program(tmp_path / "sudo", f'echo sudo "$1" >> {tmp_path}/calls; shift; exec "$@"')
    program(tmp_path / "template", "echo Chromium")
    install = f"case $2 in install) /bin/cp {tmp_path}/template {tmp_path}/chromium;; esac"
    program(tmp_path / "apt-get", f'echo "$@" >> {tmp_path}/calls; {install}')
    assert tool.chromium() == str(tmp_path / "chromium")
    update, install = "-qq update", "-qq install -y --no-install-recommends chromium"
    calls = [update, install] if root else ["sudo -n", update, "sudo -n", install]
    assert (tmp_path / "calls").read_text().splitlines() == calls


def test_two_processes_do_not_install_it_at_once(monkeypatch):
    """Two threads stand in for the processes. The function that replaces the installation by apt fails if it is called while it
    is still running, as apt-get does; afterwards both threads find the browser.
    """
    monkeypatch.delenv("CHROMIUM", raising=False)
    running, there, calls = threading.Lock(), [], []

    def install():
        calls.append("apt-get")
        if not running.acquire(blocking=False):
            return None
        time.sleep(0.2)
        there.append("/usr/bin/chromium")
        running.release()
        return there[0]

    monkeypatch.setattr(tool, "_on_path", lambda: there[0] if there else None)
    monkeypatch.setattr(tool, "_install_by_apt", install)
    monkeypatch.setattr(tool, "_install_by_playwright", lambda: None)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: tool.chromium(), range(2))) == ["/usr/bin/chromium"] * 2
    assert calls == ["apt-get"]


def test_without_any_browser_the_error_is_one_sentence(monkeypatch):
    monkeypatch.delenv("CHROMIUM", raising=False)
    for name in ("_on_path", "_install_by_apt", "_install_by_playwright"):
        monkeypatch.setattr(tool, name, lambda: None)
    with pytest.raises(RuntimeError, match="Chromium: none is on PATH, and neither apt nor Playwright could install one"):
        tool.chromium()


ADD = "(kinds) => kinds.forEach((kind) => app.graph.add(LiteGraph.createNode(kind)))"


SAVED_WITH_A_CHOICE = """() => {
  for (const node of app.graph.nodes) {
    const seed = node.widgets.find((one) => one.name === "seed");
    seed.value = 41;
    for (const control of seed.linkedWidgets) control.value = "increment";
  }
  return app.graph.serialize();
}"""


def queue_twice(frontend):
    """Queue the open workflow twice; return the seeds of each prompt as sent to the server, by kind of node."""
    prompts = []

    def answer(route):
        prompts.append(route.request.post_data_json["prompt"])
        route.fulfill(json={"prompt_id": f"prompt {len(prompts)}", "number": len(prompts), "node_errors": {}})

    frontend.page.route("**/api/prompt", answer)
    try:
        frontend.page.evaluate("async () => { await app.queuePrompt(0); await app.queuePrompt(0); }")
    finally:
        frontend.page.unroute("**/api/prompt")
    assert len(prompts) == 2
    return [
        {node["class_type"]: node["inputs"]["seed"] for node in prompt.values() if "seed" in node["inputs"]}
        for prompt in prompts
    ]


@pytest.mark.usefixtures("spoils_page")
def test_queueing_again_changes_only_the_samplers_seed(frontend):
    """This holds for newly added nodes: another seed would make another calibration.

    The setting that a workflow was saved with is kept: it is among the saved widget values, and is the user's own choice.
    """
    about = frontend.server.get("/object_info")
    ours = [kind for kind, info in about.items() if info["python_module"] == about["IECKSampler"]["python_module"]]
    kinds = [kind for kind in ours if any("seed" in names for names in about[kind]["input_order"].values())]
    assert len(kinds) > 4 and "IECKSampler" in kinds
    frontend.page.evaluate(ADD, kinds)
    first, second = queue_twice(frontend)
    assert set(first) == set(second) == set(kinds)
    assert {kind for kind in kinds if first[kind] != second[kind]} == {"IECKSampler"}
    frontend.open(frontend.page.evaluate(SAVED_WITH_A_CHOICE))
    assert queue_twice(frontend) == [dict.fromkeys(kinds, 41), dict.fromkeys(kinds, 42)]
