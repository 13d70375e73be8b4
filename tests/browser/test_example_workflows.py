"""The example workflows in the real frontend: they match the API forms, nothing overlaps, and templates open."""

import functools
import json

import comfyui
import pytest

FOLDER = comfyui.ROOT / "example_workflows"
SCREENSHOTS = comfyui.ROOT / "output" / "browser"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# Positions and sizes of the nodes with their titles, in the graph's units.
ON_CANVAS = """() => app.graph.nodes.map((node) => {
    const [width, height] = node.size, title = LiteGraph.NODE_TITLE_HEIGHT;
    return [node.title, node.pos[0], node.pos[1] - title, width, height + title];
})"""
IN_NODES_2 = """() => app.graph.nodes.map((node) => {
    const place = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect(), scale = app.canvas.ds.scale;
    return [node.title, place.x / scale, place.y / scale, place.width / scale, place.height / scale];
})"""
SHOW_ALL = """() => {
    app.canvas.ds.scale = 0.3;
    app.canvas.ds.offset = [900, 600];
    app.canvas.setDirty(true, true);
}"""


def overlaps(places):
    """Return the titles of nodes that overlap."""
    found = []
    for i, (title, x, y, width, height) in enumerate(places):
        for other, left, top, w, h in places[:i]:
            if x < left + w and left < x + width and y < top + h and top < y + height:
                found.append((title, other))
    return found


def nodes_of(name):
    return json.loads((FOLDER / f"{name}.json").read_text())["nodes"]


def without_titles(prompt):
    return {name: (node["class_type"], node["inputs"]) for name, node in prompt.items()}


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "nodes2"])
def test_workflows_open_as_their_api_form_and_nothing_overlaps(frontend, vue_nodes, monkeypatch):
    monkeypatch.setattr(frontend.server, "get", functools.cache(frontend.server.get))  # it requests the nodes each time
    for name in NAMES:
        frontend.open(json.loads((FOLDER / f"{name}.json").read_text()), name)
        api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
        assert without_titles(frontend.api_workflow()) == without_titles(api), name
        frontend.page.evaluate(SHOW_ALL)
        frontend.page.wait_for_timeout(500)
        assert overlaps(frontend.page.evaluate(IN_NODES_2 if vue_nodes else ON_CANVAS)) == [], name
        assert frontend.page.locator("[role=dialog]:visible, .p-toast-message:visible").count() == 0, name


LOOK = 300  # milliseconds between two looks of the page at its strips
RUN = """() => new Promise((done) => {
    const { api } = window.comfyAPI.api;
    window.grown = [];
    window.arrived = [];  // when the results of corrected steps arrived
    api.addEventListener("iec.step", ({ detail }) => detail.iterated.length && window.arrived.push(performance.now()));
    const looking = setInterval(() => window.grown.push(document.querySelectorAll(".iec-residual").length), 50);
    for (const kind of ["execution_success", "execution_error"]) {
        api.addEventListener(kind, () => setTimeout(() => { clearInterval(looking); done(kind); }, 500), { once: true });
    }
    const refused = () => done("refused: " + JSON.stringify(app.lastNodeErrors));
    app.queuePrompt(0, 1).then(() => Object.keys(app.lastNodeErrors ?? {}).length && refused(), refused);
})"""
# For each of the pack's samplers: the number of corrected steps in the plan and in the chart, and the strip's text.
STRIPS = """() => app.graph.nodes
    .flatMap((node) => (node.widgets ?? []).filter((widget) => widget.name === "iec_steps"))
    .map(({ element }) => [element, ...[".corrected", ".iec-residual"].map((one) => element.querySelectorAll(one).length)])
    .map(([element, corrected, charted]) => [corrected, charted, element.innerText])
"""
STEPS, SIZE = {"steps": 12}, {"width": 16, "height": 16, "batch_size": 2}  # auto corrects from 10 steps on
# The search, and measuring every layer, take several times as long as the runs; tests in tests/host run the search.
LESS = {
    "IECCalibrateQuantization": {"activation_scale": "absmax"},
    "IECCalibrateWeights": {"include": "mid*.proj_in", "steps": 2},
}
SET = """([steps, size, less]) => app.graph.nodes.forEach((node) => {
    const values = { ...steps, ...(node.type.startsWith("Empty") ? size : {}), ...less[node.type] };  // a mask stays as it is
    for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
})"""
BUILTIN = [
    "quick_start", "builtin_inpaint", "compare_and_plot", "calibrate_and_save", "load_and_sample", "less_memory",
    "find_settings",
]  # fmt: skip


# Whether the frontend has a draft with all the runs that the open workflow keeps.
IN_DRAFT = """() => {
    const plain = (text) => text.replaceAll("\\\\", "");
    const kept = app.graph.nodes.map((node) => node.properties.iec_run).filter(Boolean);
    const runs = kept.map((run) => plain(JSON.stringify(run)));
    const drafts = [localStorage, sessionStorage].flatMap((place) => Object.values(place)).map(plain);
    return runs.length > 0 && drafts.some((draft) => runs.every((run) => draft.includes(run)));
}"""
CHARTED = f"(charted) => JSON.stringify(({STRIPS})().map((strip) => strip[1])) === JSON.stringify(charted)"


@pytest.fixture(scope="module")
def has_run():
    """Return the names of the workflows that have run on the tests' server."""
    return set()


def saved_files():
    """Return calibrate_and_save in API form, with fewer steps and smaller images."""
    workflow = json.loads((FOLDER / "api" / "calibrate_and_save.json").read_text())
    for node in workflow.values():
        less = STEPS | (SIZE if node["class_type"].startswith("Empty") else {})
        less |= LESS.get(node["class_type"], {})
        node["inputs"].update({name: value for name, value in less.items() if name in node["inputs"]})
    return workflow


@pytest.mark.parametrize(("settings", "shares_page"), [({"Comfy.Workflow.Persist": True}, "workflows")], ids=["drafts"])
@pytest.mark.parametrize("name", BUILTIN)
def test_workflow_runs_in_the_frontend_and_its_strips_show_it(frontend, has_run, name):
    """The workflow has fewer steps and fewer, smaller images.

    load_and_sample loads the files of calibrate_and_save, from calibrate_and_save's own test if that ran before.
    """
    frontend.server.forget()
    if name == "load_and_sample" and "calibrate_and_save" not in has_run:
        frontend.server.run(saved_files())
    page = frontend.page
    frontend.open(json.loads((FOLDER / f"{name}.json").read_text()), name)
    page.evaluate(SET, [STEPS, SIZE, LESS])
    page.evaluate(SHOW_ALL)
    assert page.evaluate(RUN) == "execution_success"
    has_run.add(name)
    grown, arrived = page.evaluate("() => [window.grown, window.arrived]")
    strips = page.evaluate(STRIPS)
    assert bool(strips) == (name not in ("calibrate_and_save", "find_settings"))
    for corrected, charted, text in strips:
        assert corrected == charted and "last run" in text, text
    assert grown == sorted(grown)
    if arrived and arrived[-1] - arrived[0] > 2 * LOOK:  # else all may arrive between two looks at the strips
        assert len(set(grown)) > 2, grown  # during the run, not at its end
    if not strips:
        return  # no IEC sampler whose run could be kept
    page.evaluate("() => document.querySelectorAll('.iec-keep').forEach((box) => box.click())")
    page.wait_for_function(IN_DRAFT)  # the frontend saves it with a delay
    page.reload()
    page.wait_for_function("(count) => window.app?.graph?.nodes.length === count", arg=len(nodes_of(name)), timeout=60_000)
    page.wait_for_function(CHARTED, arg=[charted for _, charted, _ in strips])
    page.evaluate(SHOW_ALL)


def test_overlaps_are_found():
    assert overlaps([("a", 0, 0, 10, 10), ("b", 10, 0, 10, 10), ("c", 5, 9, 4, 4)]) == [("c", "a")]


def test_a_workflow_opens_from_the_template_browser(frontend):
    page = frontend.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog")
    dialog.get_by_text(comfyui.PACK, exact=True).first.click()
    for name in NAMES:
        dialog.get_by_text(name, exact=True).first.wait_for(state="attached")
    dialog.locator("img").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "templates.png")
    dialog.get_by_text("quick_start", exact=True).first.click()
    page.wait_for_function("() => app.graph.nodes.some((node) => node.type === 'IECKSampler')")
    assert page.evaluate("() => app.graph.groups.length") == 5
