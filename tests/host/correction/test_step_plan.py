"""The plan that is shown before a run, compared with real runs of the host's samplers."""

import asyncio
import json
import threading

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from pack import pack_module

SAMPLERS = ("euler", "heun", "heunpp2", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_2m", "uni_pc", "lcm", "seeds_3", "deis")


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture
def empty_latent():
    """A small latent, because only the steps matter."""
    return {"samples": torch.zeros(2, 3, 8, 8)}


@pytest.fixture(scope="module")
def plans(host):
    """Return the module that plans."""
    return pack_module("nodes.host.correction.step_plan")


@pytest.fixture(scope="module")
def route(host):
    """Return the module that answers the frontend."""
    return pack_module("nodes.host.correction.step_plan_route")


def sampling(sampler_name="euler", steps=6, scheduler="normal", **more):
    return {"steps": steps, "sampler_name": sampler_name, "scheduler": scheduler, **more}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("correction", [{"correction_steps": "none"}, {"correction_steps": "ends:1/3", "max_iterations": 2}])
def test_plan_agrees_with_the_run(plans, sample, model, count_evaluations, name, correction):
    counted, calls = count_evaluations(model)
    reports = []
    sample(counted, reports, steps=6, cfg=1.0, scheduler="normal", sampler_name=name, **correction)
    plan = plans.step_plan(correction, sampling(name))
    assert plan["nfe"] == len(calls) == reports[0].nfe
    assert plan["corrected"] == [step.step for step in reports[0].steps if step.corrected]
    assert plan["steps"] == len(reports[0].steps)
    calls.clear()
    sample(counted, steps=6, cfg=1.0, scheduler="normal", sampler_name=name)
    assert plan["evaluations"] == len(calls)


@pytest.mark.parametrize(
    ("inputs", "full"),
    [
        ({"interval": 3, "schedule": "uniform"}, [0, 3, 6]),
        ({"interval": 3, "schedule": "steps:2"}, [0, 2]),
        ({"interval": 3}, None),
        ({"interval": 4, "start_percent": 0.4}, None),
        ({"interval": 4, "start_percent": 0.4, "schedule": "uniform"}, None),
    ],
)
def test_planned_cached_steps_agree_with_the_run(plans, host, sample, model, inputs, full):
    cached = host.run("IECDeepCache", model=model, **{"branch": 0, **inputs})[0]
    settings = {"steps": 7, "scheduler": "normal", "correction_steps": "none"}
    network, steps, deep = cached.model.diffusion_model, [], []
    hooks = [
        network.input_blocks[0][0].register_forward_hook(lambda *_: steps.append(len(steps))),  # in each evaluation
        network.middle_block[0].register_forward_hook(lambda *_: deep.append(steps[-1])),
    ]
    try:
        sample(cached, cfg=1.0, **settings)
    finally:
        for hook in hooks:
            hook.remove()
    plan = plans.step_plan({"correction_steps": "none"}, sampling(steps=7, scheduler="normal"), inputs)
    assert steps == list(range(7))
    assert full is None or (plan["full"], plan["full_open"]) == (full, [])
    assert set(plan["full"]) <= set(deep) <= {*plan["full"], *plan["full_open"]}
    assert plan["full_by_model"] == (full is None)


PART = {"interval": 4, "start_percent": 0.4, "schedule": "uniform"}


@pytest.mark.parametrize(("scheduler", "inputs"), [("simple", {"interval": 3}), ("karras", PART)])
def test_plan_tells_which_steps_are_in_full_for_every_model(plans, scheduler, inputs):
    """The steps of a flow model have other noise levels, so that `auto` puts its full steps elsewhere."""
    settings = {"interval": 1, "branch": 0, **inputs}
    start, schedule = settings.pop("start_percent", 0.0), plans.parse_cache_schedule(settings.pop("schedule", "auto"))
    run = plans.Sampling(**sampling(steps=20, scheduler=scheduler))
    full = [
        plans.CacheSettings(**settings, schedule=schedule, start=levels.percent_to_sigma(start), levels=levels).full_steps(
            run.sigmas(levels).tolist()
        )
        for levels in plans.MODELS.values()
    ]
    plan = plans.step_plan({"correction_steps": "none"}, sampling(steps=20, scheduler=scheduler), inputs)
    assert set(plan["full"]) == frozenset.intersection(*full)
    assert set(plan["full"]) | set(plan["full_open"]) == frozenset.union(*full) and plan["full_open"]
    assert plans.step_plan({"correction_steps": "none"}, sampling(), {**inputs, "speed": 2.0})["full"] is None


def test_planned_cached_steps_of_a_profile_agree_with_its_file(plans, host, model, conditioning, profile_folder):
    run = {"steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "seed": 1, "runs": 1}
    profile = host.run(
        "IECCalibrateCacheQuant", model=model, positive=conditioning[0], negative=conditioning[1],
        latent_image={"samples": torch.zeros(2, 3, 8, 8)}, interval=3, branch=0, schedule="steps:0,2,5", **run,
    )[0]  # fmt: skip
    host.run("IECSaveCacheProfile", profile=profile, name="mine")

    def full(**run):
        return plans.step_plan({"correction_steps": "all"}, sampling(**run), {"profile_name": "mine.safetensors"})["full"]

    assert full() == [0, 2, 5]
    assert full(start_step=1) == [0, 1, 4]  # a part of the calibrated schedule; its first step is always full
    assert full(steps=7) is None  # known only at the run, which refuses it
    with pytest.raises(plans.NotKnown, match="which steps a cache evaluates in full is known when it runs"):
        plans.step_plan({"correction_steps": "full"}, sampling(steps=7), {"profile_name": "mine.safetensors"})
    assert plans.step_plan({"correction_steps": "full"}, sampling(), {"profile_name": "mine.safetensors"})["nfe"] == 9


def test_plan_counts_which_corrections_are_full_evaluations(plans):
    """The plan gives the real cost of a cached run: a full evaluation costs as much as several others."""

    def corrections(steps, **more):
        return plans.step_plan({"correction_steps": steps, "max_iterations": 2}, sampling(), **more)["full_corrections"]

    assert corrections("steps:0,1,3") == 6
    cache = {"interval": 3, "schedule": "uniform"}
    assert corrections("steps:0,1,3", cache=cache) == 4
    assert corrections("steps:0,1,3", cache=cache, correction_pass="keep") == 4
    assert corrections("steps:0,1,3", cache=cache, correction_pass="reuse") == 0


CACHES = [
    {"interval": 3, "schedule": "uniform"}, {"interval": 3, "schedule": "steps:2,5"},
    {"interval": 2, "start_percent": 0.4, "schedule": "steps:0,1,4"}, {"interval": 3}, None,
]  # fmt: skip


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("point", ["paper", "next"])
def test_full_is_the_steps_that_the_cache_evaluates_in_full(plans, host, sample, model, count_evaluations, cache, point):
    correction = {"correction_steps": "full", "evaluation_point": point}
    plan = plans.step_plan(correction, sampling(steps=7), cache)
    counted, calls = count_evaluations(model)
    cached = counted if cache is None else host.run("IECDeepCache", model=counted, **{"branch": 0, **cache})[0]
    reports = []
    sample(cached, reports, steps=7, cfg=1.0, scheduler="normal", **correction)
    corrected = [step.step for step in reports[0].steps if step.corrected]
    full = range(7) if cache is None else plan["full"]
    assert plan["corrected"] == [step for step in full if point == "paper" or step < 6]
    assert set(plan["corrected"]) <= set(corrected) <= {*plan["corrected"], *plan["open"]} <= {*full, *plan["full_open"]}
    assert plan["nfe"] == len(calls) == reports[0].nfe == 7 + len(corrected)
    text = f"steps:{','.join(map(str, corrected))}"
    listed = sample(cached, steps=7, cfg=1.0, scheduler="normal", **{**correction, "correction_steps": text})
    assert torch.equal(sample(cached, steps=7, cfg=1.0, scheduler="normal", **correction), listed)


@pytest.mark.parametrize("first", ["IECApply", "IECDeepCache", "IECSampler"])
def test_full_in_apply_iec_and_iec_sampler_follows_the_cache(host, advanced, model, conditioning, first):
    """This holds with Apply IEC before and after the cache, and around a SAMPLER."""
    correction = {"correction_steps": "full", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
    cache, sampler = {"interval": 3, "branch": 0, "schedule": "uniform"}, "euler"
    if first == "IECApply":
        patched, reports = host.run("IECApply", model=model, **correction)
        patched = host.run("IECDeepCache", model=patched, **cache)[0]
    else:
        patched = host.run("IECDeepCache", model=model, **cache)[0]
        if first == "IECSampler":
            plain = host.run("KSamplerSelect", sampler_name="euler")[0]
            sampler, reports = host.run("IECSampler", sampler=plain, **correction)
        else:
            patched, reports = host.run("IECApply", model=patched, **correction)
    guider = host.run("BasicGuider", model=patched, conditioning=conditioning[0])[0]
    advanced(guider, sampler, steps=8)
    assert [step.step for step in reports[0].steps if step.corrected] == [0, 3, 6]


@pytest.mark.parametrize(
    ("name", "scheduler", "differs"),
    [("euler", "simple", False), ("euler", "kl_optimal", True), ("euler_ancestral", "simple", True)],
)
def test_plan_of_auto_has_only_choices_common_to_both_models(plans, host, sample, model, name, scheduler, differs):
    """`auto` runs on a model with SD 1.5's noise levels and on a flow model; steps that differ are not promised."""
    flow = host.run("IECLoadBuiltinModel", precision="float32", architecture="transformer")[0]
    auto, run = {"correction_steps": "auto"}, {"steps": 20, "sampler_name": name, "scheduler": scheduler}
    plan = plans.step_plan(auto, run)
    runs = []
    for one in (model, flow):
        reports = []
        sample(one, reports, cfg=1.0, **auto, **run)
        runs.append({step.step for step in reports[0].steps if step.corrected})
        assert reports[0].nfe == plan["nfe"] == 20
    assert plan["corrected"] == sorted(runs[0] & runs[1]) and plan["open"] == sorted(runs[0] ^ runs[1])
    assert ("depends on the model's noise levels, and is known when it runs" in plan["choice"]) == differs
    assert (runs[0] != runs[1]) == differs


@pytest.mark.fast
def test_plan_omits_what_depends_on_the_models_noise_levels(plans):
    """This applies to schedules with as many steps as the model has noise levels."""
    with pytest.raises(plans.NotKnown, match="scheduler: how many steps it makes"):
        plans.step_plan({"correction_steps": "all"}, sampling(steps=300, scheduler="ddim_uniform"))


def test_full_is_unknown_if_the_cache_is_unknown(route):
    question = {"correction": {"correction_steps": "full"}, "sampling": sampling()}
    assert route._answer(question)["corrected"] == list(range(6))
    sentence = "correction_steps: which steps a cache evaluates in full is known when it runs."
    assert route._answer({**question, "is_cache_open": True}) == {"unknown": sentence}
    question["correction"] = {"correction_steps": "all"}
    assert route._answer({**question, "is_cache_open": True})["corrected"] == list(range(6))


@pytest.mark.parametrize(
    ("text", "corrected"), [("steps:0,3,5,9", [0, 3, 5]), ("steps:9", []), ("last:8", list(range(6))), ("some", [])]
)
def test_an_error_of_correction_steps_includes_the_steps_of_the_run(route, text, corrected):
    question = {
        "correction": {"correction_steps": text},
        "sampling": sampling(),
        "cache": {"interval": 3, "schedule": "uniform"},
    }
    answer = route._answer(question)
    assert answer["error"].startswith(f"correction_steps: '{text}'")
    assert (answer["steps"], answer["corrected"], answer["correctable"]) == (6, corrected, list(range(6)))
    assert answer["full"] == [0, 3]
    question["sampling"]["sampler_name"] = "euler_cfg_pp"
    assert route._answer(question)["error"]


def test_a_run_refused_for_other_inputs_has_no_plan(route):
    for correction in ({}, {"correction_steps": "all"}, {"correction_steps": "all", "lambda_": 0}):
        question = {"correction": correction, "sampling": sampling("euler_cfg_pp")}
        assert list(route._answer(question)) == ["error"]


def test_plan_lists_the_steps_that_can_be_corrected(plans):
    assert plans.step_plan({"evaluation_point": "next"}, sampling())["correctable"] == [0, 1, 2, 3, 4]
    assert plans.step_plan({"max_iterations": 0}, sampling())["correctable"] == []
    assert plans.step_plan({"correction_steps": "none"}, sampling())["correctable"] == list(range(6))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("part", "steps"),
    [({"start_step": 2, "last_step": 5}, 3), ({"denoise": 0.5}, 6), ({"denoise": 0.0}, 0), ({"last_step": 10000}, 6)],
)
def test_part_of_a_schedule(plans, part, steps):
    assert plans.step_plan({"correction_steps": "all"}, sampling(**part))["corrected"] == list(range(steps))


@pytest.mark.parametrize("leftover", ["disable", "enable"])
@pytest.mark.parametrize("part", [(0, 4), (2, 5), (2, 10000)])
def test_plan_agrees_with_ksampler_advanced(plans, host, model, conditioning, count_evaluations, leftover, part):
    counted, calls = count_evaluations(model)
    correction = {"correction_steps": "all", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0, "evaluation_point": "next"}
    patched, reports = host.run("IECApply", model=counted, **correction)
    host.run(
        "KSamplerAdvanced", model=patched, add_noise="enable", noise_seed=1, steps=8, cfg=1.0, sampler_name="heun",
        scheduler="normal", positive=conditioning[0], negative=conditioning[1], start_at_step=part[0], end_at_step=part[1],
        latent_image={"samples": torch.zeros(2, 3, 8, 8)}, return_with_leftover_noise=leftover,
    )  # fmt: skip
    told = {"start_step": part[0], "last_step": part[1], "force_full_denoise": leftover == "disable"}
    plan = plans.step_plan(correction, sampling("heun", steps=8, **told))
    assert plan["nfe"] == len(calls)
    assert plan["corrected"] == [step.step for step in reports[0].steps if step.corrected]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["euler", "dpm_2"])
def test_plan_agrees_with_a_custom_sampler(plans, host, advanced, model, conditioning, count_evaluations, name):
    """For dpm_2, KSampler computes a schedule with one more step and drops its last sigma but one; BasicScheduler does not."""
    counted, calls = count_evaluations(model)
    guider = host.run("BasicGuider", model=counted, conditioning=conditioning[0])[0]
    advanced(guider, name, steps=5, scheduler="karras", denoise=0.5)
    told = {"denoise": 0.5, "is_custom": True, "scheduler": "karras"}
    assert plans.step_plan({"correction_steps": "none"}, sampling(name, steps=5, **told))["nfe"] == len(calls)


@pytest.mark.parametrize(
    ("correction", "run", "sentence"),
    [
        ({"correction_steps": "some"}, {}, "correction_steps: 'some' is not a known form"),
        ({"correction_steps": "steps:6"}, {}, "names step 6, but the run has 6 steps"),
        ({"lambda_": 2.0}, {}, "lambda_: 2.0 is out of range"),
        ({}, {"sampler_name": "euler_cfg_pp"}, "sampler_name: euler_cfg_pp uses the unguided prediction"),
        (
            {"correction_steps": "none"},
            {"sampler_name": "dpm_adaptive"},
            "sampler_name: its steps are not known in advance, because",
        ),
        ({}, {"sampler_name": "none_such"}, "sampler_name: 'none_such' is none of"),
        ({}, {"scheduler": "none_such"}, "scheduler: 'none_such' is none of"),
        ({}, {"steps": 501}, "steps: 1 to 500 steps are drawn, but the run has 501"),
        ({}, {"steps": -5}, "steps: 1 to 500 steps are drawn, but the run has -5"),
        ({}, {"denoise": 1e-7}, "denoise: below 0.01 the steps are not drawn"),
    ],
)
def test_plan_gives_the_runs_error_message(plans, correction, run, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        plans.step_plan(correction, sampling(**run))


def question(**changed):
    """Return the JSON of a question, with values of its parts changed, such as sampling={"steps": 5}."""
    parts = {"correction": {"correction_steps": "all"}, "sampling": sampling(denoise=1.0), "cache": {"interval": 3}}
    for name, values in changed.items():
        parts[name] = {**parts[name], **values} if isinstance(values, dict) and name in parts else values
    return json.dumps(parts)


BAD_QUESTIONS = {
    "question: it is not JSON": ["", "nonsense", '{"correction"', "[" * 5000, '{"sampling": {"steps": ' + "9" * 5000 + "}}"],
    "question: [] is not an object": ["[]"],
    "question: null is not an object": ["null"],
    "question: correction is missing": ["{}"],
    "question: 'more' is not known": [question(more=1)],
    "correction: 3 is not an object": [question(correction=3)],
    "correction_steps: null is not a text": [question(correction={"correction_steps": None})],
    'correction_steps: ["all"] is not a text': [question(correction={"correction_steps": ["all"]})],
    "lambda_: NaN is not a number": [question(correction={"lambda_": float("nan")})],
    "tolerance: true is not a number": [question(correction={"tolerance": True})],
    "max_iterations: 1.5 is not a whole number": [question(correction={"max_iterations": 1.5})],
    "sampling: [] is not an object": [question(sampling=[])],
    "sampling: steps is missing": [json.dumps({"correction": {}, "sampling": {}})],
    "sampling: 'cfg' is not known": [question(sampling={"cfg": 1.0})],
    'steps: "6" is not a whole number': [question(sampling={"steps": "6"})],
    "steps: null is not a whole number": [question(sampling={"steps": None})],
    "steps: -1 is not a whole number": [question(sampling={"steps": -1})],
    "denoise: Infinity is not a number": [question(sampling={"denoise": float("inf")})],
    "sampler_name: 7 is not a text": [question(sampling={"sampler_name": 7})],
    "last_step: -3 is not a whole number": [question(sampling={"last_step": -3})],
    "cache: 5 is not an object": [question(cache=5)],
    "interval: null is not a whole number": [question(cache={"interval": None})],
    "start_percent: {} is not a number": [question(cache={"start_percent": {}})],
    "correction_pass: 1 is not a text": [question(correction_pass=1)],
}


@pytest.mark.fast
def test_a_malformed_request_gets_a_sentence(route):
    for sentence, texts in BAD_QUESTIONS.items():
        for text in texts:
            with pytest.raises(route.BadQuestion) as refused:
                route.read_question(text)
            assert str(refused.value).startswith(sentence) and len(str(refused.value)) < 300
    for fine in (question(), question(cache=None), question(sampling={"steps": 10**9, "last_step": None, "denoise": 1})):
        assert route._answer(route.read_question(fine))


@pytest.mark.fast
def test_a_client_has_one_plan_at_a_time_and_short_questions(route, monkeypatch):
    """The server is aiohttp's own, with a plan that takes until the test releases it."""
    started, let_go = threading.Event(), threading.Event()

    def slow(asked):
        started.set()
        let_go.wait(30)
        return {"steps": asked["sampling"]["steps"]}

    async def ask():
        app = web.Application()
        app.router.add_post("/", route.Planner().answer)
        async with TestClient(TestServer(app)) as client:
            first = asyncio.create_task(client.post("/", data=question()))
            await asyncio.to_thread(started.wait, 30)
            second = await client.post("/", data=question())
            let_go.set()
            answers = [await first, second, await client.post("/", data=question(sampling={"steps": 7}))]
            answers += [await client.post("/", data=data) for data in (question(sampling={"scheduler": "x" * 2**14}), b"\xff")]
            return [(answer.status, await answer.json()) for answer in answers]

    monkeypatch.setattr(route, "_answer", slow)
    (status, plan), busy, later, long, bytes_ = asyncio.run(ask())
    assert (status, plan) == (200, {"steps": 6}) and later == (200, {"steps": 7})
    assert busy == (429, {"unknown": "Another step plan is being made; ask again when it is ready."})
    assert long == (400, {"unknown": "question: it is longer than 16 KB."}) and bytes_[0] == 400


def test_an_unknown_plan_is_not_an_error(route):
    question = {"correction": {"correction_steps": "none"}, "sampling": sampling("dpm_adaptive")}
    assert "sampler_name: its steps are not known in advance, because" in route._answer(question)["unknown"]
    question["correction"] = {"correction_steps": "all"}
    assert "dpm_adaptive chooses its steps" in route._answer(question)["error"]


def test_planning_does_not_change_the_random_number_generator(route):
    """The server plans in its own thread while another thread samples."""
    import comfy.samplers

    torch.manual_seed(1)
    before, done = torch.get_rng_state(), 0
    for name in comfy.samplers.KSampler.SAMPLERS:
        answer = route._answer({"correction": {"correction_steps": "all"}, "sampling": sampling(name)})
        done += "nfe" in answer
        assert torch.equal(torch.get_rng_state(), before), name
    assert done > 20
