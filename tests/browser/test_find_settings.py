"""Find Settings (IEC) in the real frontend: what the node shows while it searches, and afterwards."""

import itertools
import re

SEEDS = itertools.count(1)  # a prompt that has run before does not run again
TRIED = ("fewer_steps", "other_samplers", "caches", "calibrated_cache", "eight_bits", "fp8", "four_bits", "correction")


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow():
    """Return a search over the number of steps of the built-in model, which gives its settings to a KSampler."""
    tries = {name: name == "fewer_steps" for name in TRIED}
    run = {"positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": next(SEEDS), "cfg": 2.0}
    search = {"steps": 8, "sampler_name": "euler", "scheduler": "karras", "goal": "least error in a time", "limit": 0.6}
    found = {"model": ["5", 0], "steps": ["5", 1], "sampler_name": ["5", 2], "scheduler": ["5", 3], "denoise": 1.0}
    return {
        "1": node("IECLoadBuiltinModel", precision="float32"),
        "2": node("IECClassLabel", labels="face"),
        "3": node("IECClassLabel", labels="none"),
        "4": node("EmptyChromaRadianceLatentImage", width=16, height=16, batch_size=1),
        "5": node("IECFindSettings", model=["1", 0], reference="full run", effort="quick", **run, **search, **tries),
        "6": node("KSampler", **run, **found),
        "7": node("VAELoader", vae_name="pixel_space"),
        "8": node("VAEDecode", samples=["6", 0], vae=["7", 0]),
        "9": node("PreviewImage", images=["8", 0]),
    }


def test_node_shows_the_best_so_far_and_then_the_verdict(frontend):
    """On the classic canvas; with Nodes 2.0 this frontend does not show the texts of any node."""
    frontend.open_api(workflow())
    frontend.page.evaluate(
        """async () => {
            const api = window.comfyAPI.api.api;
            window.told = {texts: [], isDone: false};
            api.addEventListener("progress_text", (event) => told.texts.push(event.detail.text));
            api.addEventListener("execution_success", () => { told.isDone = true; });
            await app.queuePrompt(0, 1);
        }"""
    )
    frontend.page.wait_for_function("() => window.told.isDone", timeout=120_000)
    *during, verdict = frontend.page.evaluate("() => window.told.texts")
    assert len(during) > 2 and re.fullmatch(
        r"\d+% done, about \d+ s left. Best so far: 8 steps: error 0 at 1.00 of the time", during[0]
    )
    assert re.fullmatch(r"\d steps at 0\.\d\d of the time: error \S+ \(2 runs\)\.", verdict)
    frontend.page.get_by_text(verdict).first.wait_for(timeout=10_000)
