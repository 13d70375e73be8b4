"""The strip of steps on the IEC sampler nodes, in the real frontend: the planned corrections, and the results of a run."""

import itertools

import pytest
from playwright.sync_api import TimeoutError

SAMPLING = {"steps": 20, "sampler_name": "euler", "scheduler": "normal"}
CORRECTION = {
    "correction_steps": "ends:1/10", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5, "evaluation_point": "paper",
    "lambda_mode": "fixed", "lambdas": "",
}  # fmt: skip
CACHE = {
    "interval": 3, "branch": 0, "correction_pass": "refresh", "schedule": "uniform", "start_percent": 0.0, "end_percent": 1.0,
    "forecast": "hold",
}  # fmt: skip


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


AFTER_A_LOOK = 700  # milliseconds in which the page has looked at the graph twice

SEEDS = itertools.count(1)  # a prompt that has run before does not run again


def workflow(sampler="IECKSampler", steps=20, size=16, **correction):
    """Return a run of the built-in model with a cache, corrected by the node of this id.

    size: of its images; at 32, the model's own size, a run takes long enough to be observed.
    """
    seed = next(SEEDS)
    sampling, correction = {**SAMPLING, "steps": steps}, {**CORRECTION, **correction}
    nodes = {
        "1": node("IECLoadBuiltinModel", precision="float32"),
        "2": node("IECDeepCache", model=["1", 0], **CACHE),
        "3": node("IECClassLabel", labels="face, heart"),
        "4": node("IECClassLabel", labels="none"),
        "5": node("EmptyChromaRadianceLatentImage", width=size, height=size, batch_size=2),
        "7": node("VAELoader", vae_name="pixel_space"),
        "8": node("VAEDecode", samples=["6", 0], vae=["7", 0]),
        "9": node("PreviewImage", images=["8", 0]),
    }
    guided = {"positive": ["3", 0], "negative": ["4", 0], "cfg": 2.0}
    run = {"latent_image": ["5", 0], "seed": seed, **guided}
    if sampler == "IECKSampler":
        more = {"denoise": 1.0, "label": "", "keep_latents": False}
        nodes["6"] = node("IECKSampler", model=["2", 0], **run, **sampling, **correction, **more)
    elif sampler == "IECApply":
        nodes["10"] = node("IECApply", model=["1", 0], **correction)
        nodes["2"]["inputs"]["model"] = ["10", 0]
        nodes["6"] = node("KSampler", model=["2", 0], **run, **sampling, denoise=1.0)
    else:
        nodes["11"] = node("KSamplerSelect", sampler_name="euler")
        nodes["10"] = node("IECSampler", sampler=["11", 0], **correction)
        nodes["12"] = node("BasicScheduler", model=["2", 0], scheduler="normal", steps=steps, denoise=1.0)
        nodes["13"] = node("CFGGuider", model=["2", 0], **guided)
        nodes["14"] = node("RandomNoise", noise_seed=seed)
        parts = {"noise": ["14", 0], "guider": ["13", 0], "sampler": ["10", 0], "sigmas": ["12", 0]}
        nodes["6"] = node("SamplerCustomAdvanced", latent_image=["5", 0], **parts)
    return nodes


class Strip:
    """The strip in a Frontend's page."""

    def __init__(self, frontend):
        self.page = frontend.page

    def wait(self, text):
        """Wait until the strip has this text."""
        self.page.locator(".iec", has_text=text).first.wait_for(timeout=60_000)

    def steps(self, *classes):
        """Return the numbers of the cells that have these classes."""
        have = "(cells, classes) => cells.flatMap((cell, i) => classes.every((one) => cell.classList.contains(one)) ? [i] : [])"
        return self.page.locator(".iec-cell").evaluate_all(have, list(classes))

    def text(self):
        """Return the strip's text."""
        return self.page.locator(".iec").first.inner_text()

    def show(self):
        """Scroll the node with the strip, and the strip, into view."""
        self.page.evaluate(
            """async () => {
                const node = app.graph.nodes.find((one) => one.widgets?.some((widget) => widget.name === "iec_steps"));
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [500 - node.pos[0], 150 - node.pos[1]];
                app.canvas.setDirty(true, true);
                for (let frame = 0; frame < 5; frame++) await new Promise(requestAnimationFrame);
            }"""
        )

    def set(self, kind, widget, value):
        """Set a widget of the node of this id, as typing into it does."""
        self.page.evaluate(
            """([kind, name, value]) => {
                const node = app.graph.nodes.find((one) => one.comfyClass === kind);
                const widget = node.widgets.find((one) => one.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [kind, widget, value],
        )

    def value(self, kind, widget):
        """Return a widget's value."""
        return self.page.evaluate(
            "([kind, name]) => app.graph.nodes.find((n) => n.comfyClass === kind).widgets.find((w) => w.name === name).value",
            [kind, widget],
        )

    def run(self):
        """Queue the workflow and wait for the end of its run; return the data of the events, and the strip's texts during the
        run.
        """
        self.page.evaluate(
            """async () => {
                const api = window.comfyAPI.api.api;
                const told = window.told = {steps: [], runs: [], seen: [], isDone: false};
                const look = () => {
                    const dots = document.querySelectorAll(".iec-residual").length;
                    told.seen.push([document.querySelector(".iec")?.innerText ?? "", dots]);
                };
                api.addEventListener("iec.step", (event) => told.steps.push(event.detail));  // of a later run too
                api.addEventListener("iec.run", (event) => told.runs.push(event.detail));
                api.addEventListener("execution_success", () => { told.isDone = true; });
                window.looking = setInterval(look, 50);
                await app.queuePrompt(0, 1);
            }"""
        )
        self.page.wait_for_function("() => window.told.runs.length === 1 && window.told.isDone", timeout=120_000)
        self.wait("last run")
        self.page.wait_for_timeout(AFTER_A_LOOK)
        self.page.evaluate("() => clearInterval(window.looking)")
        return self.page.evaluate("() => window.told")


@pytest.fixture
def strip(frontend):
    """Return the Strip of a page, on the classic canvas, and also with Nodes 2.0 if a test is marked `both`."""
    return Strip(frontend)


@pytest.fixture
def shares_page():
    return "workflows"


# Module scope, so that pytest groups the tests by these two, and the page is loaded only twice.
both = pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "nodes2"], scope="module")


@pytest.mark.parametrize("sampler", ["IECKSampler", "IECApply", "IECSampler"])
def test_strip_shows_what_will_be_corrected_and_cached(frontend, strip, sampler):
    frontend.open_api(workflow(sampler))
    strip.wait("20 → 24 evaluations, +20 %")
    strip.show()
    assert len(strip.steps()) == 20
    assert strip.steps("corrected") == [0, 1, 18, 19]
    assert strip.steps("cached") == [step for step in range(20) if step % 3]
    assert "7 of 20 steps in full" in strip.text() and "2 of 4 corrections also in full" in strip.text()


def test_full_steps_that_depend_on_the_model_are_shown_as_such_until_a_run(frontend, strip):
    """`auto` goes by the noise levels; before the run, the strip knows those of several models."""
    frontend.open_api(workflow())
    strip.wait("7 of 20 steps in full, the others cached")
    strip.show()
    strip.set("IECDeepCache", "schedule", "auto")
    strip.wait("in full or cached, depending on the model")
    maybe, cached = strip.steps("maybe-cached"), strip.steps("cached")
    certain = 20 - len(maybe) - len(cached)
    assert certain >= 1 and maybe and cached and 0 not in maybe + cached
    line = f"{certain} of 20 steps in full with most models, {len(maybe)} in full or cached, depending on the model"
    assert line in strip.text()
    strip.run()
    strip.wait("in the last run: 7 of 20 steps in full, the others cached")
    assert strip.steps("maybe-cached") == []
    of_run = strip.steps("cached")
    assert len(of_run) == 13 and set(cached) <= set(of_run) <= set(cached) | set(maybe)
    strip.set("IECKSampler", "correction_steps", "auto")
    strip.page.wait_for_function("() => document.querySelector('.iec-cell.open')")
    strip.run()
    strip.page.wait_for_function("() => !document.querySelector('.iec-cell.open')")
    full = [step for step in range(20) if step not in strip.steps("cached")]
    corrected = strip.steps("corrected")  # those of the run
    assert len(corrected) >= 4 and set(corrected) <= {step - 1 for step in full}
    strip.page.locator(".iec-cell").nth(corrected[0]).click()
    strip.page.wait_for_function(f"() => document.querySelectorAll('.iec-cell.corrected').length === {len(corrected) - 1}")
    strip.set("IECDeepCache", "speed", 2)
    strip.wait("in the last run: 7 of 20 steps in full, the others cached")
    strip.set("IECKSampler", "correction_steps", "none")
    strip.set("IECKSampler", "steps", 12)
    strip.wait("which steps are cached is known when the node runs")


@both
def test_strip_follows_the_graph(frontend, strip):
    frontend.open_api(workflow())
    strip.wait("20 → 24 evaluations, +20 %")
    strip.set("IECKSampler", "steps", 60)
    strip.wait("60 → 72 evaluations, +20 %")
    assert len(strip.steps()) == 60
    strip.set("IECKSampler", "sampler_name", "heun")
    strip.wait("119 → 131 evaluations, +10 %")
    strip.set("IECDeepCache", "interval", 10)
    strip.wait("6 of 60 steps in full")
    strip.set("IECKSampler", "correction_steps", "none")
    strip.wait("119 evaluations")
    strip.page.evaluate("() => { app.graph.nodes.find((one) => one.comfyClass === 'IECDeepCache').mode = 4; }")  # bypassed
    strip.page.wait_for_function("() => !document.querySelector('.iec').innerText.includes('in full')")
    assert strip.steps("cached") == []


@pytest.mark.parametrize(
    ("widget", "value", "sentence"),
    [
        ("correction_steps", "some", "correction_steps: 'some' is not a known form; write auto, all, none"),
        ("correction_steps", "steps:20", "names step 20, but the run has 20 steps"),
        ("sampler_name", "dpm_adaptive", "dpm_adaptive chooses its steps by its own error estimate"),
    ],
)
def test_strip_shows_why_the_settings_would_be_refused(frontend, strip, widget, value, sentence):
    frontend.open_api(workflow())
    strip.wait("20 → 24 evaluations, +20 %")
    strip.set("IECKSampler", widget, value)
    strip.wait(sentence)
    strip.set("IECKSampler", "correction_steps", "first:1")
    strip.set("IECKSampler", "sampler_name", "euler")
    strip.wait("20 → 21 evaluations, +5 %")


def test_strip_shows_the_choice_of_auto_and_a_click_writes_it_to_the_inputs(frontend, strip):
    frontend.open_api(workflow(steps=12, correction_steps="auto"))
    strip.wait("12 → 12 evaluations")
    strip.wait("auto corrects 3 of 12 steps")
    assert strip.steps("corrected") == [2, 5, 8]  # a cache's full steps are 0, 3, 6 and 9
    strip.set("IECKSampler", "sampler_name", "dpmpp_2m")
    strip.wait("auto corrects nothing: the sampler also uses predictions of earlier steps")
    assert strip.steps("corrected") == [] and "12 evaluations" in strip.text()
    strip.set("IECKSampler", "sampler_name", "euler")
    strip.wait("auto corrects 3 of 12 steps")
    strip.show()
    strip.page.locator(".iec-cell").nth(0).click()
    strip.page.wait_for_function("() => !document.querySelector('.iec').innerText.includes('auto')")
    assert strip.value("IECKSampler", "correction_steps") == "steps:0,2,5,8"
    assert strip.value("IECKSampler", "evaluation_point") == "ahead"
    assert "12 → 12 evaluations" in strip.text() and strip.steps("corrected") == [0, 2, 5, 8]


@both
def test_clicks_on_cells_choose_the_corrected_steps(frontend, strip):
    frontend.open_api(workflow(steps=5, correction_steps="last:1"))
    strip.wait("5 → 6 evaluations")
    strip.show()
    chosen = [(1, "steps:1,4", 7), (4, "steps:1", 6), (1, "none", 5), (2, "steps:2", 6)]
    chosen += [(step, None, 7 + i) for i, step in enumerate((0, 1, 3))] + [(4, "all", 10)]
    for step, text, nfe in chosen:
        strip.page.locator(".iec-cell").nth(step).click()
        strip.wait(f"{nfe} evaluations")
        assert text is None or strip.value("IECKSampler", "correction_steps") == text
    assert frontend.prompt()["6"]["inputs"]["correction_steps"] == "all"
    strip.page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
    strip.wait("5 → 9 evaluations")
    assert strip.value("IECKSampler", "correction_steps") == "steps:0,1,2,3"


@both
def test_a_click_removes_steps_outside_the_run(frontend, strip):
    frontend.open_api(workflow(steps=20, correction_steps="steps:0,5,10,15"))
    strip.wait("20 → 24 evaluations")
    strip.show()
    strip.set("IECKSampler", "steps", 12)
    strip.wait("names step 15, but the run has 12 steps")
    assert len(strip.steps()) == 12 and strip.steps("corrected") == [0, 5, 10]
    assert strip.steps("cached") == [step for step in range(12) if step % 3]
    assert "evaluations" not in strip.text() and "A click on a step writes a valid list." in strip.text()
    strip.page.locator(".iec-cell").nth(7).click()
    strip.wait("12 → 16 evaluations")
    assert strip.value("IECKSampler", "correction_steps") == "steps:0,5,7,10"
    strip.set("IECKSampler", "correction_steps", "som")
    strip.wait("correction_steps: 'som' is not a known form")
    assert len(strip.steps()) == 12 and strip.steps("corrected") == []
    strip.page.evaluate("() => [3, 4].forEach((step) => document.querySelectorAll('.iec-cell')[step].click())")
    strip.wait("12 → 14 evaluations")
    assert strip.value("IECKSampler", "correction_steps") == "steps:3,4"


@pytest.mark.parametrize("sampler", ["IECKSampler", "IECApply", "IECSampler"])
def test_full_follows_the_cache(frontend, strip, sampler):
    frontend.open_api(workflow(sampler, correction_steps="full"))
    strip.wait("7 of 7 corrections also in full")
    strip.show()
    assert strip.steps("corrected") == list(range(0, 20, 3))
    strip.set("IECDeepCache", "interval", 5)
    strip.wait("4 of 4 corrections also in full")
    assert strip.steps("corrected") == [0, 5, 10, 15]
    strip.page.evaluate("() => { app.graph.nodes.find((one) => one.comfyClass === 'IECDeepCache').mode = 4; }")  # bypassed
    strip.wait("20 → 40 evaluations")


def into_subgraph(frontend, *classes):
    """Make a subgraph of the nodes of these classes, and open it."""
    frontend.page.evaluate(
        """(classes) => {
            const inside = app.graph.nodes.filter((one) => classes.includes(one.comfyClass));
            const { node } = app.graph.convertToSubgraph(new Set(inside));
            app.canvas.openSubgraph(node.subgraph, node);
        }""",
        list(classes),
    )


def test_full_of_a_cache_outside_a_subgraph_is_shown_after_the_run(frontend, strip):
    frontend.open_api(workflow(correction_steps="full", steps=5))
    strip.wait("5 → 7 evaluations")
    into_subgraph(frontend, "IECKSampler")
    strip.wait("which steps a cache evaluates in full is known when it runs")
    assert strip.steps() == []
    strip.run()
    assert strip.steps("corrected") == [0, 3] and strip.steps("cached") == [1, 2, 4]


@both
def test_strip_is_not_cut_off(frontend, strip):
    def missing():
        height = "(selector) => document.querySelector(selector).getBoundingClientRect().height"
        return strip.page.evaluate(height, ".iec-body") - strip.page.evaluate(height, ".iec")

    frontend.open_api(workflow(steps=5))
    strip.wait("5 → 7 evaluations")
    strip.show()
    strip.page.wait_for_timeout(AFTER_A_LOOK)
    assert missing() <= 0
    strip.set("IECKSampler", "correction_steps", "some")
    strip.wait("is not a known form")
    strip.page.wait_for_timeout(AFTER_A_LOOK)
    assert missing() <= 0


def test_steps_that_cannot_be_corrected_are_not_clickable(frontend, strip):
    frontend.open_api(workflow(steps=5, correction_steps="none", evaluation_point="next"))
    strip.wait("5 evaluations")
    cells = strip.page.locator(".iec-cell")
    assert [cells.nth(step).is_enabled() for step in range(5)] == [True, True, True, True, False]


def test_strip_adds_nothing_to_the_prompt(frontend, strip):
    prompt = workflow()
    frontend.open_api(prompt)
    strip.wait("20 → 24 evaluations, +20 %")
    assert frontend.prompt()["6"]["inputs"] == prompt["6"]["inputs"]
    saved = frontend.page.evaluate("() => app.graph.serialize().nodes.find((one) => one.type === 'IECKSampler')")
    widgets = [value for value in prompt["6"]["inputs"].values() if not isinstance(value, list)]
    control_of_the_seed = 1
    assert len(saved["widgets_values"]) == len(widgets) + control_of_the_seed and "iec_run" not in saved["properties"]


@pytest.mark.parametrize("sampler", ["IECKSampler", "IECApply", "IECSampler"])
def test_chart_grows_during_the_run(frontend, strip, sampler):
    frontend.open_api(workflow(sampler, steps=12, size=32, correction_steps="steps:0,3,6,9"))
    strip.wait("12 → 16 evaluations")
    strip.show()
    told = strip.run()
    running = [dots for text, dots in told["seen"] if "running" in text]
    assert running == sorted(running) and set(running) & {1, 2, 3}, running
    (run,) = told["runs"]
    assert [one["step"] for one in run["iterated"]] == [0, 3, 6, 9]
    chart = strip.page.locator(".iec-chart")
    assert chart.locator(".iec-residual").count() == chart.locator(".iec-contraction").count() == 4
    titles = chart.locator(".iec-residual title").all_text_contents()
    for title, one in zip(titles, run["iterated"]):
        assert title.startswith(f"step {one['step']}: residual")
        residual, contraction = (float(part.split(" ")[-1]) for part in title.split(", "))
        assert residual == pytest.approx(one["residuals"][-1], rel=5e-3)
        assert contraction == pytest.approx(one["contraction"][-1], rel=5e-3)
    assert f"NFE {run['nfe']}" in strip.text()


def test_clicks_in_quick_succession_all_count(frontend, strip):
    frontend.open_api(workflow(steps=6, correction_steps="none"))
    strip.wait("6 evaluations")
    strip.page.evaluate("() => [0, 2, 4].forEach((step) => document.querySelectorAll('.iec-cell')[step].click())")
    assert strip.value("IECKSampler", "correction_steps") == "steps:0,2,4"
    strip.wait("6 → 9 evaluations")


def test_linked_correction_steps_cannot_be_clicked(frontend, strip):
    prompt = workflow(steps=4)
    prompt["15"] = node("PrimitiveString", value="first:1")
    prompt["6"]["inputs"]["correction_steps"] = ["15", 0]
    frontend.open_api(prompt)
    strip.wait("4 → 5 evaluations")
    assert strip.page.locator(".iec-cell").first.is_disabled()
    assert "over a link" in strip.page.locator(".iec-cell").first.get_attribute("title")


def test_a_busy_server_is_asked_again_and_the_previous_plan_is_marked(frontend, strip):
    """The page's requests get a busy answer (429) and then a refusal (400), both from the test; while the server is busy, the
    previous plan stays and is marked.
    """
    frontend.open_api(workflow(steps=4))
    strip.wait("4 → 6 evaluations")
    busy = {"unknown": "Another step plan is being made; ask again when it is ready."}
    strip.page.route("**/iec/step_plan", lambda route: route.fulfill(status=429, json=busy))
    strip.set("IECKSampler", "steps", 5)
    strip.wait("The server is making the plan; until then, this is the plan of the previous settings.")
    assert "4 → 6 evaluations" in strip.text()
    strip.page.unroute("**/iec/step_plan")
    strip.wait("5 → 7 evaluations")
    assert "previous settings" not in strip.text()
    refusal = {"unknown": "steps: null is not a whole number of at least 0."}
    strip.page.route("**/iec/step_plan", lambda route: route.fulfill(status=400, json=refusal))
    strip.set("IECKSampler", "steps", 6)
    strip.wait(refusal["unknown"])
    strip.page.unroute("**/iec/step_plan")
    frontend.errors.clear()  # the browser's own errors about the statuses


def test_focus_stays_on_the_cell(frontend, strip):
    frontend.open_api(workflow(steps=4, correction_steps="none"))
    strip.wait("4 evaluations")
    cell = strip.page.locator(".iec-cell").nth(2)
    cell.focus()
    strip.page.keyboard.press("Space")
    strip.wait("4 → 5 evaluations")
    assert cell.evaluate("(element) => element === document.activeElement")


RUN = {"steps": 3, "corrected": [], "iterated": {}, "warnings": [], "nfe": 3, "seconds": 1.0, "correction": "none"}


@pytest.mark.parametrize(
    "kept",
    [{}, True, {"steps": 3, "iterated": None}, {"steps": 10**6, "corrected": [], "warnings": []}, {**RUN, "source": "5"}],
    ids=["empty", "true", "null", "huge", "of the node that this is a copy of"],
)
def test_malformed_or_foreign_kept_runs_are_ignored(frontend, strip, kept):
    frontend.open_api(workflow(steps=4))
    strip.wait("4 → 6 evaluations")
    saved = frontend.page.evaluate("() => app.graph.serialize()")
    next(one for one in saved["nodes"] if one["type"] == "IECKSampler")["properties"]["iec_run"] = kept
    frontend.open(saved)
    strip.wait("4 → 6 evaluations")
    assert "last run" not in strip.text()


def test_interrupted_run_leaves_no_running_strip(frontend, strip):
    frontend.open_api(workflow(steps=400))
    strip.wait("400 → 480 evaluations")
    frontend.page.evaluate("() => app.queuePrompt(0, 1)")
    strip.wait("running")
    frontend.server.interrupt()
    frontend.page.wait_for_function("() => !document.querySelector('.iec').innerText.includes('running')", timeout=60_000)
    assert "last run" not in strip.text()
    frontend.errors.clear()  # the frontend's own error about the interrupt


def test_strips_of_another_workflow_are_dropped(frontend, strip):
    frontend.open_api(workflow(steps=5))
    strip.wait("5 → 7 evaluations")
    frontend.page.evaluate(
        """() => {
            const inside = app.graph.nodes.filter((one) => one.comfyClass === "IECKSampler");
            const { node } = app.graph.convertToSubgraph(new Set(inside));
            const old = node.subgraph.nodes[0].graph;
            const look = old.getNodeById.bind(old);
            old.getNodeById = (id) => { window.looks++; return look(id); };
        }"""
    )
    frontend.open_api({"1": node("IECLoadBuiltinModel", precision="auto")}, "another")
    frontend.page.wait_for_timeout(AFTER_A_LOOK)
    looks = "async (wait) => { window.looks = 0; await new Promise((done) => setTimeout(done, wait)); return window.looks; }"
    assert frontend.page.evaluate(looks, AFTER_A_LOOK) == 0


@both
def test_a_step_that_fell_back_is_reported_on_the_node(frontend, strip):
    frontend.open_api(workflow(steps=4, correction_steps="all", lambda_=1.0, max_iterations=6))
    strip.wait("4 → 28 evaluations")
    strip.show()
    told = strip.run()
    (run,) = told["runs"]
    assert run["warnings"] and any(one["fell_back"] for one in run["iterated"])
    shown = strip.page.locator(".iec-warning").all_text_contents()
    assert shown == [f"⚠ {sentence}" for sentence in run["warnings"]]
    assert "try a smaller lambda_" in shown[0]
    assert strip.page.locator(".iec-fell-back").count() == sum(one["fell_back"] for one in run["iterated"])


@pytest.mark.parametrize("is_kept", [True, False])
def test_last_run_is_saved_with_the_workflow_on_request(frontend, strip, is_kept):
    frontend.open_api(workflow(steps=6))
    strip.wait("6 → 8 evaluations")
    strip.show()
    strip.run()
    if is_kept:
        strip.page.locator(".iec-keep").check()
    saved = frontend.page.evaluate("() => app.graph.serialize()")
    frontend.load()
    frontend.open(saved)
    strip.wait("6 → 8 evaluations")
    strip.page.wait_for_timeout(AFTER_A_LOOK)
    assert strip.page.locator(".iec-residual").count() == (2 if is_kept else 0)
    assert ("last run" in strip.text()) == is_kept
    strip.show()


@both
def test_a_run_with_other_settings_is_marked(frontend, strip):
    """The mark is in the text and on the chart until the settings are the run's again; it also applies to a kept run."""

    def wait(*facts):
        if facts:
            strip.wait(f"This run had {', '.join(facts)}; the strip above shows the current settings.")
        else:
            strip.page.wait_for_function("() => !document.querySelector('.iec').innerText.includes('This run had')")
        assert strip.page.locator(".iec-chart.iec-other").count() == bool(facts)

    frontend.open_api(workflow(steps=6))
    strip.wait("6 → 8 evaluations")
    strip.show()
    strip.run()
    strip.page.get_by_label("keep with workflow").check()
    wait()
    saved = frontend.page.evaluate("() => app.graph.serialize()")
    next(one for one in saved["nodes"] if one["type"] == "IECKSampler")["widgets_values"][2] = 12
    frontend.load(vue_nodes=frontend.page.evaluate("() => LiteGraph.vueNodesMode"))
    frontend.open(saved)
    strip.wait("12 → 14 evaluations")
    was = ("6 steps", "ends:1/10", "2 in full")
    wait(*was)
    strip.show()
    strip.set("IECKSampler", "steps", 6)
    wait()
    for node, widget, other, own in (
        ("IECKSampler", "correction_steps", "first:1", "ends:1/10"),
        ("IECKSampler", "correction_steps", "steps:6", "ends:1/10"),
        ("IECKSampler", "evaluation_point", "next", "paper"),
        ("IECKSampler", "scheduler", "karras", "normal"),
        ("IECKSampler", "denoise", 0.9, 1),
        ("IECDeepCache", "interval", 4, 3),
        ("IECDeepCache", "schedule", "steps:2", "uniform"),
    ):
        strip.set(node, widget, other)
        wait(*was)
        strip.set(node, widget, own)
        wait()


KEPT_IN_DRAFT = """(nfe) => [localStorage, sessionStorage].flatMap((place) => Object.values(place))
    .some((draft) => draft.replaceAll("\\\\", "").includes(`"nfe":${nfe},`) && draft.includes("iec_run"))"""


@pytest.mark.usefixtures("fresh_page", "spoils_page")
@pytest.mark.parametrize("settings", [{"Comfy.Workflow.Persist": True}], ids=["drafts"])
def test_chart_outlives_a_reload_of_the_page(frontend, strip):
    frontend.open_api(workflow(steps=6))
    strip.wait("6 → 8 evaluations")
    strip.show()
    strip.run()
    strip.page.locator(".iec-keep").check()
    strip.page.wait_for_function(KEPT_IN_DRAFT, arg=8)  # the frontend saves it with a delay
    frontend.page.reload()
    strip.wait("last run")
    strip.wait("6 → 8 evaluations")
    assert strip.page.locator(".iec-residual").count() == 2
    strip.set("IECKSampler", "correction_steps", "first:3")  # a later run is kept too
    strip.run()
    strip.page.wait_for_function(KEPT_IN_DRAFT, arg=9)
    frontend.page.reload()
    strip.wait("NFE 9")
    assert strip.page.locator(".iec-residual").count() == 3


def test_a_run_in_a_subgraph_is_shown_inside_it(frontend):
    strip = Strip(frontend)
    frontend.open_api(workflow(steps=5))
    strip.wait("5 → 7 evaluations")
    into_subgraph(frontend, "IECKSampler", "IECDeepCache")
    strip.wait("5 → 7 evaluations")
    (run,) = strip.run()["runs"]
    assert ":" in run["source"]
    assert strip.page.locator(".iec-residual").count() == 2


@pytest.mark.parametrize("mode", [2, 4], ids=["muted", "bypassed"])
def test_a_subgraph_that_does_not_run_is_reported(frontend, strip, mode):
    """If two nodes refer to one subgraph, it runs if one of them runs."""
    frontend.open_api(workflow(steps=5))
    strip.wait("5 → 7 evaluations")
    into_subgraph(frontend, "IECKSampler", "IECDeepCache")
    change = """([place, mode]) => {
        const root = app.rootGraph ?? app.graph.rootGraph;
        const holders = () => root.nodes.filter((one) => one.subgraph);
        if (holders().length === place) root.add(holders()[0].clone());
        holders()[place].mode = mode;
    }"""
    strip.page.evaluate(change, [0, mode])
    strip.wait("The subgraph is muted or bypassed: the node does not run.")
    assert "evaluations" not in strip.text()
    strip.page.evaluate(change, [1, 0])
    strip.wait("5 → 7 evaluations")
    strip.page.evaluate(change, [1, mode])
    strip.wait("The subgraph is muted or bypassed: the node does not run.")


def test_steps_of_a_cache_outside_a_subgraph_are_shown_after_the_run(frontend):
    strip = Strip(frontend)
    frontend.open_api(workflow(steps=5))
    strip.wait("5 → 7 evaluations")
    into_subgraph(frontend, "IECKSampler")
    strip.wait("which steps are cached is known when the node runs")
    strip.run()
    assert "in the last run: 2 of 5 steps in full, the others cached" in strip.text()
    assert strip.steps("cached") == [1, 2, 4]


def test_run_of_another_workflow_is_not_shown(frontend):
    """Two tabs contain the same node ids."""
    strip = Strip(frontend)
    frontend.open_api(workflow(steps=5), "first")
    strip.wait("5 → 7 evaluations")
    strip.run()
    frontend.open_api(workflow(steps=6), "second")
    strip.wait("6 → 8 evaluations")
    frontend.page.wait_for_timeout(AFTER_A_LOOK)
    assert "last run" not in strip.text()


def leave(frontend, command):
    """Execute the frontend's command, and wait until another workflow is open."""
    before = frontend.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    frontend.page.evaluate("(command) => app.extensionManager.command.execute(command)", command)
    other = "(before) => app.extensionManager.workflow.activeWorkflow?.path !== before"
    frontend.page.wait_for_function(other, arg=before)
    frontend.page.wait_for_timeout(AFTER_A_LOOK)


def go(frontend, there):
    """Show the tab before ("Previous") or after ("Next") the open one."""
    leave(frontend, f"Workspace.{there}OpenedWorkflow")


def graph_id(frontend):
    return frontend.page.evaluate("(app.rootGraph ?? app.graph).id")


def test_run_in_one_of_two_tabs_of_a_workflow_is_not_shown_in_the_other(frontend, strip):
    """The first tab corrects two steps, its copy five."""

    def wait_for_dots(number):
        wanted = "(number) => document.querySelectorAll('.iec-residual').length === number"
        frontend.page.wait_for_function(wanted, arg=number, timeout=60_000)
        strip.wait("last run")

    frontend.open_api(workflow(steps=5), "one of two")
    strip.wait("5 → 7 evaluations")
    strip.run()
    own = graph_id(frontend)
    leave(frontend, "Comfy.DuplicateWorkflow")
    strip.wait("5 → 7 evaluations")
    assert "last run" not in strip.text()
    strip.set("IECKSampler", "correction_steps", "all")
    strip.wait("5 → 10 evaluations")
    frontend.page.evaluate("app.queuePrompt(0, 1)")
    wait_for_dots(5)
    go(frontend, "Previous")
    wait_for_dots(2)
    assert graph_id(frontend) == own
    go(frontend, "Next")
    wait_for_dots(5)
    assert graph_id(frontend) != own


def open_six_steps(frontend, form):
    """Open a workflow of six steps, without an id, next to one of five steps.

    form: the API form, or "saved", the form in which the frontend saves it.
    """
    if form == "api":
        return frontend.open_api(workflow(steps=6), f"second {form}")
    saved = frontend.page.evaluate("(app.rootGraph ?? app.graph).serialize()")
    sampler = next(node for node in saved["nodes"] if node["type"] == "IECKSampler")
    sampler["widgets_values"][sampler["widgets_values"].index(5)] = 6
    return frontend.open({key: value for key, value in saved.items() if key != "id"}, f"second {form}")


STEPS_OF_FIRST = """(first) => app.extensionManager.workflow.openWorkflows.find((one) => one.path.includes(first))
    .activeState.nodes.find((one) => one.type === "IECKSampler").widgets_values.find((one) => [5, 6].includes(one))"""


@pytest.mark.parametrize("form", ["api", "saved"])
def test_run_of_a_workflow_in_api_form_is_shown_when_its_tab_is_opened_again(frontend, strip, form):
    frontend.open_api(workflow(steps=5), f"first {form}")
    strip.wait("5 → 7 evaluations")
    strip.run()
    open_six_steps(frontend, form)
    strip.wait("6 → 8 evaluations")
    if form == "api" and frontend.page.evaluate(STEPS_OF_FIRST, f"first {form}") == 6:
        pytest.skip("this frontend has written the second workflow into the first one's tab")
    for there, text, is_run in (("Previous", "5 → 7", True), ("Next", "6 → 8", False), ("Previous", "5 → 7", True)):
        go(frontend, there)
        strip.wait(f"{text} evaluations")
        assert ("last run" in strip.text()) == is_run


@pytest.mark.usefixtures("spoils_page")
def test_runs_are_shown_if_the_frontend_does_not_identify_tabs(frontend, strip):
    frontend.page.evaluate("() => { app.extensionManager = undefined; }")
    frontend.open_api(workflow(steps=5), "no tab")
    strip.wait("5 → 7 evaluations")
    strip.run()
    assert "last run" in strip.text()


KNOWN_LATER = "The steps are known when the node runs."
CACHE_LATER = "which steps are cached is known when the node runs"
IN_FULL = "7 of 20 steps in full, the others cached"

# Nodes of other packs: those without a part on the server, and those with one, which the frontend knows from the server's list.
DEFINE = """async () => {
    const define = (type, inputs, outputs, isVirtualNode) => {
        class Other extends LiteGraph.LGraphNode {
            constructor() {
                super(type);
                for (const [name, kind] of inputs) this.addInput(name, kind);
                for (const kind of outputs) this.addOutput(kind, kind);
                this.isVirtualNode = isVirtualNode;
            }
        }
        LiteGraph.registerNodeType(type, Other);
    };
    define("TestSetNode", [["MODEL", "MODEL"]], [], true);
    define("TestGetNode", [], ["MODEL"], true);
    const output = { output_is_list: [false], output_name: ["out"], category: "test", output_node: false, description: "" };
    const other = (name, required, kind) => app.registerNodeDef(name, {
        ...output, name, display_name: name, python_module: "custom_nodes.another-pack", output: [kind],
        input: { required }, input_order: { required: Object.keys(required) },
    });
    await other("TestPatch", { model: ["MODEL", {}] }, "MODEL");
    await other("TestAnySwitch", { any_01: ["*", {}], any_02: ["*", {}] }, "*");
    await other("TestFromPipe", { pipe: ["BASIC_PIPE", {}] }, "MODEL");
    await other("TestToPipe", { model: ["MODEL", {}] }, "BASIC_PIPE");
    await other("TestLoader", { name: ["STRING", {}] }, "MODEL");
    await other("TestWrapper", { sampler: ["SAMPLER", {}] }, "SAMPLER");
    await other("TestSampler", { model: ["MODEL", {}], steps: ["INT", {}], denoise: ["FLOAT", {}],
        sampler_name: [["euler"], {}], scheduler: [["normal"], {}] }, "LATENT");
}"""
# Open a workflow and change it: `one(class)` is its node, `put(type, from, to, input)` inserts a new node between two.
CHANGED = """async ([prompt, change]) => {
    await app.loadApiJson(prompt, "workflow");
    const one = (kind) => app.graph.nodes.find((node) => node.comfyClass === kind || node.type === kind);
    const add = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
    const wire = (from, to, name) => from.connect(0, to, to.inputs.findIndex((input) => input.name === name));
    const put = (type, from, to, name) => {
        const node = add(type);
        from.connect(0, node, 0);
        wire(node, to, name);
        return node;
    };
    const set = (kind, name, value) => { one(kind).widgets.find((widget) => widget.name === name).value = value; };
    const copy = (kind) => { const node = one(kind).clone(); app.graph.add(node); return node; };
    new Function("one, add, wire, put, set, copy", change)(one, add, wire, put, set, copy);
}"""
TOLD = """([kinds, others]) => {
    const text = document.querySelector(".iec")?.innerText ?? "";
    return kinds.every((one) => text.includes(one)) && !others.some((one) => text.includes(one));
}"""
MODEL = "one('IECDeepCache'), one('IECKSampler'), 'model'"
CASES = {
    # name: (the workflow's sampler, change, texts that the strip has, texts that it lacks)
    "as it is": ("IECKSampler", "", ["20 → 24 evaluations", IN_FULL], ["when it runs"]),
    "reroutes": ("IECKSampler", f"put('Reroute', {MODEL})", ["20 → 24 evaluations", IN_FULL], ["when it runs"]),
    "host's patch": ("IECKSampler", f"put('FreeU', {MODEL})", ["20 → 24 evaluations", IN_FULL], ["when it runs"]),
    "bypassed patch": ("IECKSampler", f"put('TestPatch', {MODEL}).mode = 4", ["20 → 24", IN_FULL], ["when it runs"]),
    "bypassed cache": ("IECKSampler", "one('IECDeepCache').mode = 4", ["20 → 24 evaluations"], ["in full", "when it runs"]),
    "muted cache": ("IECKSampler", "one('IECDeepCache').mode = 2", ["20 → 24 evaluations", CACHE_LATER], ["in full"]),
    "patch of another pack": ("IECKSampler", f"put('TestPatch', {MODEL})", ["20 → 24", CACHE_LATER], ["in full"]),
    "loader of another pack": (
        "IECKSampler", "wire(add('TestLoader'), one('IECKSampler'), 'model')", ["20 → 24", CACHE_LATER], ["in full"],
    ),
    "Set and Get": (
        "IECKSampler",
        "one('IECDeepCache').connect(0, add('TestSetNode'), 0); wire(add('TestGetNode'), one('IECKSampler'), 'model')",
        ["20 → 24 evaluations", CACHE_LATER], ["in full"],
    ),
    "pipe": (
        "IECKSampler",
        "const pipe = add('TestToPipe'); one('IECDeepCache').connect(0, pipe, 0); "
        "put('TestFromPipe', pipe, one('IECKSampler'), 'model')",
        ["20 → 24 evaluations", CACHE_LATER], ["in full"],
    ),
    "any-switch": ("IECKSampler", f"put('TestAnySwitch', {MODEL})", ["20 → 24 evaluations", CACHE_LATER], ["in full"]),
    "nothing wired": (
        "IECKSampler", "one('IECKSampler').disconnectInput(0)", ["20 → 24 evaluations", CACHE_LATER], ["in full"],
    ),
    "cache of the host": ("IECKSampler", f"put('EasyCache', {MODEL})", ["20 → 24 evaluations", CACHE_LATER], ["in full"]),
    "cache in a subgraph": (
        "IECKSampler",
        "app.graph.convertToSubgraph(new Set([one('IECDeepCache')]))",
        ["20 → 24 evaluations", CACHE_LATER],
        ["in full"],
    ),
    "merge": (
        "IECKSampler", f"wire(one('IECLoadBuiltinModel'), put('ModelMergeSimple', {MODEL}), 'model2')",
        ["20 → 24 evaluations", IN_FULL], ["when it runs"],
    ),
    "auto behind what is not known": (
        "IECKSampler", f"put('TestPatch', {MODEL}); set('IECKSampler', 'correction_steps', 'auto')",
        ["is known when it runs"], ["evaluations", "auto corrects"],
    ),
    "auto with the host's cache": (
        "IECKSampler", f"put('EasyCache', {MODEL}); set('IECKSampler', 'correction_steps', 'auto')",
        ["is known when it runs"], ["evaluations", "auto corrects"],
    ),
    "muted": ("IECKSampler", "one('IECKSampler').mode = 2", ["The node is muted: it does not run."], ["evaluations"]),
    "bypassed": ("IECApply", "one('IECApply').mode = 4", ["The node is bypassed: it corrects nothing."], ["evaluations"]),
    "Apply IEC as it is": ("IECApply", "", ["20 → 24 evaluations", IN_FULL], ["when it runs"]),
    "a copy of the sampler": (
        "IECApply",
        "const again = copy('KSampler'); wire(one('IECDeepCache'), again, 'model')",
        ["20 → 24 evaluations", IN_FULL], ["when it runs"],
    ),
    "samplers that differ": (
        "IECApply",
        "const again = copy('KSampler'); wire(one('IECDeepCache'), again, 'model'); "
        "again.widgets.find((w) => w.name === 'steps').value = 9",
        [KNOWN_LATER], ["evaluations"],
    ),
    "muted second sampler": (
        "IECApply",
        "const again = copy('KSampler'); wire(one('IECDeepCache'), again, 'model'); "
        "again.widgets.find((w) => w.name === 'steps').value = 9; again.mode = 2",
        ["20 → 24 evaluations", IN_FULL], ["when it runs"],
    ),
    "Apply IEC before another pack's patch": (
        "IECApply", "put('TestPatch', one('IECApply'), one('IECDeepCache'), 'model')", [KNOWN_LATER], ["evaluations"],
    ),
    "Apply IEC before a Set": (
        "IECApply", "one('IECApply').connect(0, add('TestSetNode'), 0)", [KNOWN_LATER], ["evaluations"],
    ),
    "Apply IEC in a merge's second": (
        "IECApply",
        "const merge = put('ModelMergeSimple', one('IECLoadBuiltinModel'), one('IECDeepCache'), 'model'); "
        "wire(one('IECApply'), merge, 'model2')",
        [KNOWN_LATER], ["evaluations"],
    ),
    "sampler of another pack": (
        "IECApply",
        "app.graph.remove(one('KSampler')); wire(one('IECDeepCache'), add('TestSampler'), 'model')",
        [KNOWN_LATER], ["evaluations"],
    ),
    "IEC Sampler as it is": ("IECSampler", "", ["20 → 24 evaluations", IN_FULL], ["when it runs"]),
    "wrapper behind IEC Sampler": (
        "IECSampler", "put('TestWrapper', one('IECSampler'), one('SamplerCustomAdvanced'), 'sampler')",
        [KNOWN_LATER], ["evaluations"],
    ),
    "wrapper before IEC Sampler": (
        "IECSampler", "put('TestWrapper', one('KSamplerSelect'), one('IECSampler'), 'sampler')", [KNOWN_LATER], ["evaluations"],
    ),
    "bypassed wrapper": (
        "IECSampler", "put('TestWrapper', one('IECSampler'), one('SamplerCustomAdvanced'), 'sampler').mode = 4",
        ["20 → 24 evaluations", IN_FULL], ["when it runs"],
    ),
}  # fmt: skip


@pytest.mark.usefixtures("spoils_page")
def test_strip_shows_only_what_the_graph_determines(frontend, strip):
    """Nodes that may pass on anything, and nodes without an effect, are put between and after those of a run."""
    strip.page.evaluate(DEFINE)
    wrong = {}
    for name, (sampler, change, told, untold) in CASES.items():
        strip.page.evaluate(CHANGED, [workflow(sampler), change])
        try:
            strip.page.wait_for_function(TOLD, arg=[told, untold], timeout=4000)
        except TimeoutError:
            wrong[name] = strip.text()
    assert wrong == {}
