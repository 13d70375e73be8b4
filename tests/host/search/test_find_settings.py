"""IECFindSettings: what it measures, what it chooses, and what it refuses.

The clock of the measurements counts how often the network's middle block runs, so that shares of the time are exact.
"""

import json
import re

import numpy as np
import pytest
import torch
from pack import pack_module

SAMPLING = {"steps": 8, "cfg": 2.0, "sampler_name": "euler", "scheduler": "karras"}
ALL = ("fewer_steps", "other_samplers", "caches", "calibrated_cache", "eight_bits", "fp8", "four_bits", "correction")
SIZE = (2, 3, 16, 16)


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture(autouse=True)
def evaluations(model, monkeypatch):
    """Return the list that grows with each run of the middle block; its length is the time of the measurements."""
    counted = []
    block = model.model.diffusion_model.middle_block[-1]
    monkeypatch.setattr(pack_module("nodes.host.search.measuring"), "seconds", lambda: float(len(counted)))
    hook = block.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    hook.remove()


@pytest.fixture
def find(host, model, conditioning):
    """Return find(*tried, **inputs), which gives {output: value} of the node that tries these options."""

    def run(*tried, **inputs):
        given = {
            "model": model, "positive": conditioning[0], "negative": conditioning[1], "seed": 5,
            "latent_image": {"samples": torch.zeros(SIZE)}, "goal": "least error in a time", "limit": 0.5,
            "reference": "full run", "effort": "quick", **{name: name in tried for name in ALL}, **SAMPLING, **inputs,
        }  # fmt: skip
        names = ("model", "steps", "sampler_name", "scheduler", "settings", "verdict", "table", "plot")
        return dict(zip(names, host.run("IECFindSettings", **given)))

    return run


@pytest.fixture
def drawn(host, conditioning):
    """Return drawn(model, seed, **sampling), which gives the latents of the host's own sampler."""

    def run(model, seed, positive=None, **sampling):
        given = {**SAMPLING, **sampling}
        arguments = [given[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]
        latent = {"samples": torch.zeros(SIZE)}
        return host.common_ksampler(model, seed, *arguments, positive or conditioning[0], conditioning[1], latent)[0]["samples"]

    return run


def rows_of(found):
    """Return {settings: (share, error, runs, note)} of a table, as texts, in its order."""
    lines = [line.split("|")[1:-1] for line in found["table"].splitlines()[2:]]
    return {cells[0].strip(): tuple(cell.strip() for cell in cells[1:]) for cells in lines}


def mean_error(latents, references):
    """Return ||x - reference|| / ||reference||, the mean over the images of all runs."""
    errors = [(x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1) for x, y in zip(latents, references)]
    return torch.cat(errors).double().mean().item()


def test_outputs_make_a_stock_sampler_repeat_what_was_measured(find, drawn, host, model):
    other = host.run("IECClassLabel", labels="bird, boat")[0]
    found = find("fewer_steps", "caches", "correction", positive_2=other)
    chosen = {name: found[name] for name in ("steps", "sampler_name", "scheduler")}
    prompts = [None, other]
    latents = [drawn(found["model"], 5 + run, prompt, **chosen) for run, prompt in enumerate(prompts)]
    error = mean_error(latents, [drawn(model, 5 + run, prompt) for run, prompt in enumerate(prompts)])
    (row,) = [row for row in rows_of(found).values() if row[3] == "chosen"]
    assert (row[1], row[2]) == (f"{error:.4g}", "2")
    assert f"error {error:.3g} (2 runs)" in found["verdict"]
    settings = json.loads(found["settings"])
    assert {name: settings[name] for name in chosen} == chosen
    assert 0 < float(row[0]) <= 0.51


def test_shares_are_those_of_the_evaluations_and_errors_those_of_the_runs(find, drawn, model):
    rows = rows_of(find("fewer_steps", "caches", effort="normal"))
    full = [drawn(model, 5 + run) for run in range(4)]
    fewer = mean_error([drawn(model, 5 + run, steps=4) for run in range(4)], full)
    assert rows["4 steps"][:3] == ("0.500", f"{fewer:.4g}", "4")
    assert rows["8 steps"][:3] == ("1.000", "0", "4")
    assert rows["DeepCache (4 of 8 steps in full)"][0] == "0.500"


def test_shares_are_those_of_the_fastest_full_run(find, evaluations, monkeypatch):
    """The machine is half as fast during the first two full runs, and the step before them; the third shows its true speed."""
    slow = 1 + 2 * 8
    clock = pack_module("nodes.host.search.measuring")
    monkeypatch.setattr(clock, "seconds", lambda: float(len(evaluations) + min(len(evaluations), slow)))
    rows = rows_of(find("fewer_steps", limit=0.8))
    assert rows["8 steps"][0] == "1.000" and rows["6 steps"][0] == "0.750" and rows["6 steps"][3] == "chosen"


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_errors_to_the_converged_solution(find, drawn, model, sampler):
    rows = rows_of(find("fewer_steps", reference="converged", sampler_name=sampler))
    exact, full = ([drawn(model, seed, sampler_name=sampler, steps=steps) for seed in (5, 6)] for steps in (32, 8))
    error = mean_error(full, exact)
    assert rows["8 steps"][:2] == ("1.000", f"{error:.4g}")


def test_least_time_for_an_error_takes_the_fewest_steps_within_it(find, drawn, model):
    full = [drawn(model, 5 + run) for run in range(2)]
    errors = {steps: mean_error([drawn(model, 5 + run, steps=steps) for run in range(2)], full) for steps in range(1, 9)}
    limit = (errors[4] + errors[5]) / 2
    found = find("fewer_steps", goal="least time for an error", limit=limit)
    fewest = min(steps for steps, error in errors.items() if error <= limit)
    assert found["steps"] == fewest and f"{fewest} steps at {fewest / 8:.2f} of the time" in found["verdict"]


def test_every_option_is_tried(find):
    rows = rows_of(find(*ALL, effort="thorough"))
    parts = {part for settings in rows for part in re.split(r", | \(", settings)}
    assert {"DeepCache", "EasyCache", "CacheQuant", "8 bits", "fp8", "4 bits", "corrected", "dpmpp_2m on karras"} <= parts
    assert {"euler on simple", "4 steps"} <= parts
    assert not [row for row in rows.values() if row[3] not in ("", "chosen")]


def test_same_seed_gives_the_same_table(find):
    first, second = (find("fewer_steps", "caches", "eight_bits", "calibrated_cache") for _ in range(2))
    assert first["table"] == second["table"] and first["settings"] == second["settings"]
    assert torch.equal(first["plot"], second["plot"])


def test_what_cannot_run_is_a_row_with_its_reason(find, monkeypatch):
    import comfy.model_management

    variants = pack_module("nodes.host.search.variants")

    def refuse(*_):
        raise ValueError("model: no cache fits.\nReally.")

    def run_out(*_):
        raise comfy.model_management.OOM_EXCEPTION("much too large")

    monkeypatch.setattr(variants, "apply_cache", refuse)
    monkeypatch.setattr(variants, "quantize_model", run_out)
    found = find("fewer_steps", "caches", "eight_bits")
    reasons = {settings.split(" (")[0]: row[3] for settings, row in rows_of(found).items()}
    assert reasons["DeepCache"] == "model: no cache fits. Really."
    assert {reason for settings, reason in reasons.items() if settings.startswith("8 bits")} == {"out of memory"}
    assert "chosen" in reasons.values()


def test_result_that_is_not_finite_is_refused(find, monkeypatch):
    variants = pack_module("nodes.host.search.variants")

    def spoilt(model, *_):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
        return model

    monkeypatch.setattr(variants, "apply_cache", spoilt)
    notes = [row[3] for name, row in rows_of(find("fewer_steps", "caches")).items() if name.startswith("DeepCache")]
    assert notes == ["its result contains NaN or infinity"]


def test_interrupt_ends_the_search_and_leaves_nothing_on_the_model(find, model, monkeypatch):
    import comfy.model_management

    variants = pack_module("nodes.host.search.variants")

    def interrupt(*_):
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(variants, "with_easycache", interrupt)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        find("fewer_steps", "caches", "eight_bits")
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert not any(model.wrappers.values()) and not model.object_patches


def test_one_progress_bar_rises_to_its_end(find, host, monkeypatch):
    import comfy.utils

    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: told.append(value / total))
    find("fewer_steps", "caches", "calibrated_cache", "four_bits")
    assert told == sorted(told) and told[-1] == 1 and len(told) > 5


@pytest.mark.parametrize("made", ["IECDeepCache", "IECQuantizeModel", "IECApply", "EasyCache"])
def test_model_that_is_changed_already_is_refused(find, host, model, made):
    inputs = {
        "IECDeepCache": {"interval": 2, "branch": -1},
        "IECQuantizeModel": {"weight_bits": "8", "activation_bits": "8", "keep_sensitive_layers": True},
        "IECApply": {"correction_steps": "auto", "lambda_": 0.5, "max_iterations": 1, "tolerance": 1e-5},
        "EasyCache": {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
    }[made]  # fmt: skip
    changed = host.run(made, model=model, **inputs)[0]
    with pytest.raises(
        ValueError, match=r"^model: this MODEL is (quantized|cached|corrected by IEC) already; connect the model"
    ):
        find("fewer_steps", model=changed)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"limit": 1.0}, "limit: 1 is not less than the full run's time; write a share of it below 1, such as 0.5."),
        ({"goal": "best"}, "goal: 'best' is none of "),
        ({"reference": "none"}, "reference: 'none' is none of "),
        ({"effort": "much"}, "effort: 'much' is none of "),
        ({"sampler_name": "oiler"}, "sampler_name: 'oiler' is none of "),
        ({"scheduler": "karas"}, "scheduler: 'karas' is none of "),
        ({"limit": 0.0}, "limit: 0.0 is outside 0.001 to 10."),
        (
            {"reference": "converged", "sampler_name": "euler_ancestral"},
            "reference: converged needs a sampler that comes to the same result with more steps, but euler_ancestral adds "
            "noise; choose full run, or another sampler.",
        ),
        (dict.fromkeys(ALL, False), f"{', '.join(ALL)}: all are off, so that there is nothing to try; turn on at least one."),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused(find, inputs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        find(*(ALL if len(inputs) < len(ALL) else ()), **inputs)


def test_nothing_within_the_limit_gives_the_nearest(find):
    found = find("eight_bits", limit=0.2)
    assert found["verdict"].startswith("Nothing that was tried is within 0.2 of the time. The nearest: ")


def test_plot_marks_the_chosen_one(find):
    plot = find("fewer_steps", "caches")["plot"]
    ring = torch.tensor([0xE6, 0x9F, 0x00]) / 255
    assert plot.shape[0] == 1 and ((plot[0] - ring).abs().sum(-1) < 0.02).sum() > 30


def test_plot_has_the_verdict_and_no_error_above_1_but_that_of_the_chosen_one(find, monkeypatch):
    drawn = []
    plots = pack_module("nodes.reports.plots")
    monkeypatch.setattr(plots, "found_settings", lambda *given: drawn.append(given) or np.zeros((9, 9, 3), np.uint8))
    monkeypatch.setattr(
        pack_module("nodes.host.search.measuring"), "_error", lambda x, y: 0.0 if x is y else (x - y).norm().item() + 0.9
    )
    for limit in (0.8, 0.1):  # with 0.1, one step is the only one within the limit
        found = find("fewer_steps", limit=limit)
        candidates, _, chosen, above = drawn.pop()
        table = {settings: float(row[1]) for settings, row in rows_of(found).items()}
        assert max(table.values()) > 1 and above == found["verdict"]
        name = candidates[chosen][0]
        assert {one: error for one, error in table.items() if 0 < error <= 1 or one == name}.keys() == {
            one[0] for one in candidates
        }


def test_type_of_a_choice_fits_every_list_of_choices():
    kind = pack_module("nodes.types").ChoiceOutput().io_type
    assert [kind != other for other in (["euler", "heun"], "COMBO", "INT", "COMBO,INT")] == [False, False, True, True]
    assert kind == "COMBO" and json.dumps(kind) == '"COMBO"'
