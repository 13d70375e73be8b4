"""IECDeepCache on each of the host's transformers: small networks of the host's classes, with its samplers and guidances.

The expected result is the cache written out over the network's blocks (`Restated`), without any code of the pack.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import sys
import typing
import weakref

import pytest
import torch
from reference import carried_forward
from transformer_families import FAMILIES, IMAGE, VIDEO, build, conditioning, empty_latent, flat, noise

STEPS = 6
FULL = {0, 3}  # of an interval of 3


@pytest.fixture(scope="module")
def models(host):
    """Return models(name, **settings), which gives the family's MODEL, made once."""
    return functools.cache(build)


@pytest.fixture
def cached(host):
    return lambda model, branch=0, interval=3, **settings: host.run(
        "IECDeepCache", model=model, interval=interval, branch=branch, **{"forecast": "hold", "schedule": "uniform", **settings}
    )[0]


@pytest.fixture(scope="module")
def sample(host):
    """Return sample(name, model, **settings), which gives the latents of the host's own KSampler.

    own: additional values of the conditionings.
    """

    def run(name, model, cfg=2.0, sampler="euler", shape=None, tokens=(7, 7), own=(), steps=STEPS):
        entries = [conditioning(name, seed, count, **dict(own)) for seed, count in zip((1, 2), tokens)]
        latent = empty_latent(shape or FAMILIES[name].latent)
        return flat(host.common_ksampler(model, 3, steps, cfg, sampler, "simple", *entries, latent)[0])

    return run


SHORT = 5  # steps: two full ones, each followed by cached ones


@pytest.fixture(scope="module")
def plain(sample, models):
    """Return plain(name, steps), which gives the latents of the family's unchanged MODEL, made once."""
    return functools.cache(lambda name, steps=SHORT: sample(name, models(name), steps=steps))


def blocks_of(network, family):
    """Return [(block, the path of its list, its streams)] in the order of evaluation."""
    lists = [(network.get_submodule(place).children(), place, streams) for place, streams in family.lists.items()]
    return [(block, place, streams) for blocks, place, streams in lists for block in blocks]


@contextlib.contextmanager
def watched(blocks, method, function):
    """Call function(number, forward, args, kwargs) instead of each block's forward pass."""
    modules = [block for block, *_ in blocks]
    for number, module in enumerate(modules):
        forward = getattr(module, method)
        setattr(module, method, lambda *args, n=number, f=forward, **kwargs: function(n, f, args, kwargs))
    try:
        yield
    finally:
        for module in modules:
            delattr(module, method)


def step_of(options):
    """Return the step of an evaluation: the last of the schedule's sigmas that it has reached."""
    reached = options["sample_sigmas"] >= options["sigmas"][0] * (1 - 1e-6)
    return min(int(reached.sum()), len(reached) - 1) - 1


MARKS = ("skipped", "stg_self_attn_blocks", "a2v_cross_attn", "v2a_cross_attn")  # distinguish evaluations of an entry


class Restated:
    """The cache, restated over blocks that all run.

    A cached evaluation replaces the output of a list's last inner block. The replacement is the input of the first inner block
    plus the residual of the last full evaluation. If an evaluation runs a list several times, as MiniMax Music does for one
    window of a long sound after another, each of these passes has its own residual. degree: of the polynomial through the
    residuals. added(number, sigma): None, or (stream, first token, tensor) that is added to a block's output, as the host adds
    a ControlNet's.
    """

    def __init__(self, name, model, branch, full=FULL, degree=0, added=lambda number, sigma: None):
        self.family, self.model, self.full, self.degree, self.added = FAMILIES[name], model, full, degree, added
        self.blocks = blocks_of(model.model.diffusion_model, self.family)
        self.first, self.last, self.inner = {}, {}, range(branch + 1, len(self.blocks) - branch - 1)
        for number in self.inner:
            place = self.blocks[number][1]
            self.first.setdefault(place, number)
            self.last[place] = number
        self.kept, self.entered = {}, {}

    def evaluate(self, executor, x, t, c_concat, c_crossattn, control, options, **kwargs):
        """Replace the host's apply_model; record which evaluation it is."""
        marks = tuple(options.get(mark) for mark in MARKS)
        self.entries = [(uuid, marks, frozenset(kwargs)) for uuid in options["uuids"]]
        self.step, self.sigma, self.skipped = step_of(options), options["sigmas"][0], options.get("skipped", ())
        self.passes = dict.fromkeys(self.first, 0)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def streams(self, number, args, kwargs):
        """Return the block's inputs of the streams that it passes on; a tuple (picture and sound) counts as several."""
        given = [kwargs[name] if isinstance(name, str) else args[name] for name in self.blocks[number][2]]
        return list(given[0]) if isinstance(given[0], (tuple, list)) else given

    def leave(self, place, left):
        """Return the output of the inner blocks of a list; left: that of the last block, None for a stream that it drops."""
        numbers = [number for number, value in enumerate(left) if value is not None]
        given = [self.entered[place][number] for number in numbers]
        kept = iter(self.residuals(place, numbers, given, [left[number] for number in numbers]))
        return [None if value is None else next(kept) for value in left]

    def residuals(self, place, numbers, given, left):
        """Return the streams of these numbers as the inner blocks leave them."""
        keys = [[(*entry, place, self.passes[place], number) for entry in self.entries] for number in numbers]
        if self.step not in self.full and all(key in self.kept for key in itertools.chain(*keys)):
            parts = [[carried_forward(self.kept[key], self.step, self.degree) for key in own] for own in keys]
            residuals = [torch.cat(own, self.family.batch) for own in parts]
            return [entered + residual for entered, residual in zip(given, residuals)]
        for own, entered, value in zip(keys, given, left):
            for key, part in zip(own, (value - entered).chunk(len(own), self.family.batch)):
                earlier = [item for item in self.kept.get(key, []) if item[0] != self.step]
                self.kept[key] = [*earlier, (self.step, part)]
        return left

    def block(self, number, forward, args, kwargs):
        """Replace the block's forward pass."""
        place, given = self.blocks[number][1], self.streams(number, args, kwargs)
        if number == self.first.get(place):
            self.passes[place] += 1
            self.entered[place] = [value.clone() for value in given]
        out = (given if len(given) > 1 else given[0]) if number in self.skipped else forward(*args, **kwargs)
        several = not torch.is_tensor(out)
        left = list(out) if several else [out]
        if number == self.last.get(place):
            left[: len(given)] = self.leave(place, left[: len(given)])
        if (one := self.added(number, self.sigma)) is not None:
            stream, start, add = one
            left[stream] = left[stream].clone()
            left[stream][:, start : start + add.shape[1]] += add
        return tuple(left) if several else left[0]

    @contextlib.contextmanager
    def patched(self, model=None):
        """Yield a clone of the MODEL that runs as restated here. model: the same MODEL with further patches, default none."""
        from comfy.patcher_extension import WrappersMP

        model = (model or self.model).clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, f"restated {id(self)}", self.evaluate)
        with watched(self.blocks, self.family.method, self.block):
            yield model


@pytest.fixture
def restated(sample, models):
    """Return restated(name, branch, **settings), which gives the expected latents of a cached run of the family."""

    def run(name, branch, model=None, full=FULL, degree=0, added=lambda number, sigma: None, **settings):
        model = model or models(name)
        with Restated(name, model, branch, full, degree, added).patched() as patched:
            return sample(name, patched, **settings)

    return run


@pytest.fixture
def count_blocks(sample):
    """Return count_blocks(name, model, **settings), which gives (latents, {(step, block): number of times it ran})."""
    from comfy.patcher_extension import WrappersMP

    def run(name, model, **settings):
        now, counts = [], {}

        def note(executor, *args, **kwargs):
            now[:] = [step_of(args[5])]
            return executor(*args, **kwargs)

        def count(number, forward, args, kwargs):
            counts[now[0], number] = counts.get((now[0], number), 0) + 1
            return forward(*args, **kwargs)

        model, family = model.clone(), FAMILIES[name]
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "count", note)
        with watched(blocks_of(model.model.diffusion_model, family), family.method, count):
            return sample(name, model, **settings), counts

    return run


BRANCHES = [(name, branch) for name, family in FAMILIES.items() for branch in family.branches]


@pytest.mark.parametrize("name", FAMILIES)
def test_interval_one_is_bit_identical_to_no_cache(sample, models, plain, cached, name):
    assert torch.equal(sample(name, cached(models(name), interval=1), steps=SHORT), plain(name))


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
def test_equals_the_cache_restated(models, plain, cached, restated, count_blocks, relative, name, branch):
    result, counts = count_blocks(name, cached(models(name), branch), steps=SHORT)
    assert relative(result, restated(name, branch, steps=SHORT)) < 1e-5
    assert relative(result, plain(name)) > 1e-4
    total = len(blocks_of(models(name).model.diffusion_model, FAMILIES[name]))
    outer = {*range(branch + 1), *range(total - branch - 1, total)}
    assert set(counts) == {(step, block) for step in range(SHORT) for block in range(total) if step in FULL or block in outer}


@pytest.mark.parametrize(("name", "takes_skip"), [("HunyuanDiT", lambda args, kwargs: args[4]),
                                                  ("Hunyuan3D 2.1", lambda args, kwargs: kwargs["skip_tensor"])])  # fmt: skip
def test_a_cached_step_uses_its_own_skip_connections(sample, models, cached, name, takes_skip):
    """Transformers built like a U-Net join block k to block n - 1 - k: a branch runs both blocks or neither."""
    model, left, joined = models(name), {}, []

    def note(number, forward, args, kwargs):
        left[number] = forward(*args, **kwargs)
        if takes_skip(args, kwargs) is not None:
            joined.append((number, [n for n, out in left.items() if out is takes_skip(args, kwargs)]))
        return left[number]

    blocks = blocks_of(model.model.diffusion_model, FAMILIES[name])
    with watched(blocks, "forward", note):
        sample(name, cached(model, branch=1, interval=9))
    last = len(blocks) - 1
    assert joined[-2:] == [(last - 1, [1]), (last, [0])]
    assert len(joined) >= 2 * STEPS and all(origins == [last - number] for number, origins in joined)


@pytest.mark.parametrize(("forecast", "degree"), [("linear", 1), ("auto", None)])
@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_forecasts_equal_the_cache_restated(sample, models, cached, restated, relative, name, forecast, degree):
    result = sample(name, cached(models(name), schedule="steps:1,4", forecast=forecast))
    assert relative(result, restated(name, 0, full={0, 1, 4}, degree=degree)) < 1e-5
    assert relative(result, restated(name, 0, full={0, 1, 4})) > 1e-4


@pytest.mark.parametrize(("name", "branch", "streams"), [
    ("Flux", 0, {"double_blocks.1.img", "double_blocks.1.txt", "single_blocks.0.x"}), ("Wan", 0, {"blocks.1.x"}),
    ("Flux", -1, {"double_blocks.0.img", "double_blocks.0.txt", "single_blocks.0.x"}), ("SD3", -1, {"joint_blocks.0.1"}),
])  # fmt: skip
@pytest.mark.parametrize("forecast", ["hold", "linear"])
def test_calibrated_residuals(host, sample, models, cached, relative, name, branch, streams, forecast):
    """With a profile of the run's own noise, the result is nearer to the uncached run than the plain cache's, at as many full
    steps.
    """
    model, family = models(name), FAMILIES[name]
    prompt, other = conditioning(name, 1), conditioning(name, 2)
    profile = host.run(
        "IECCalibrateCacheQuant", model=model, positive=prompt, negative=other, latent_image=empty_latent(family.latent),
        seed=3, runs=1, steps=STEPS, cfg=2.0, sampler_name="euler", scheduler="simple", interval=3, branch=branch,
        forecast=forecast,
    )[0]  # fmt: skip
    assert set(profile.features) == streams and len(profile.full_steps) == len(FULL)
    exact, plain = sample(name, model), sample(name, cached(model, branch))
    calibrated = sample(name, host.run("IECCacheQuant", model=model, profile=profile)[0])
    assert relative(calibrated, exact) < 0.9 * relative(plain, exact)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m"])
def test_samplers_other_than_euler(sample, models, cached, restated, relative, sampler):
    """Heun's second evaluation is at the next step's sigma and counts as the next step's; dpm_2's is between the two sigmas.

    dpmpp_2m evaluates once per step, but uses earlier predictions.
    """
    result = sample("Flux", cached(models("Flux"), 1), sampler=sampler)
    assert relative(result, restated("Flux", 1, sampler=sampler)) < 1e-5
    assert relative(result, sample("Flux", models("Flux"), sampler=sampler)) > 1e-4


def test_bfloat16(sample, models, cached, restated, relative):
    model = models("Flux", dtype=torch.bfloat16)
    result = sample("Flux", cached(model))
    assert relative(result, restated("Flux", 0, model)) < 1e-5
    assert relative(result, sample("Flux", model)) > 1e-2


def test_batch_and_resolution_may_change_between_runs(sample, models, cached, restated, relative):
    model = cached(models("Flux"))
    for shape in ((2, 16, 10, 14), (1, 16, 8, 8), (3, 16, 8, 8)):
        assert relative(sample("Flux", model, shape=shape), restated("Flux", 0, shape=shape)) < 1e-5


def test_prompts_of_different_lengths(sample, models, cached, restated, relative):
    """The host evaluates these two prompts separately."""
    result = sample("Flux", cached(models("Flux")), tokens=(11, 7))
    assert relative(result, restated("Flux", 0, tokens=(11, 7))) < 1e-5


@pytest.mark.parametrize("splits", [[True], [False, False, True], [True, True, False]])
def test_guidance_in_two_batches_equals_one_batch(sample, models, cached, relative, monkeypatch, splits):
    """The result is also the same if the host has the memory for one batch at one step and not at the next."""
    import comfy.model_base

    together = sample("SD3", cached(models("SD3")))
    turns = itertools.cycle(splits)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30 if next(turns) else 0)
    assert relative(sample("SD3", cached(models("SD3"))), together) < 1e-5


def test_lora(sample, models, cached, restated, relative):
    def with_lora(model):
        model = model.clone()
        keys = [f"diffusion_model.{place}.proj.weight" for place in ("double_blocks.1.img_attn", "double_blocks.0.txt_attn")]
        assert set(model.add_patches({key: (noise(32, 32) / 4,) for key in keys}, 0.7)) == set(keys)
        return model

    model = models("Flux")
    result = sample("Flux", cached(with_lora(model)))
    assert torch.equal(result, sample("Flux", with_lora(cached(model))))
    assert relative(result, restated("Flux", 0, with_lora(model))) < 1e-5
    assert relative(result, sample("Flux", cached(model))) > 1e-3


@pytest.mark.parametrize(("correction_pass", "full_passes", "fed_on"), [("refresh", 2, 1), ("keep", 2, 0), ("reuse", 1, 0)])
def test_correction_pass(host, models, cached, relative, correction_pass, full_passes, fed_on):
    """Check how often the inner blocks run for a corrected full step, and which pass's residual the next step adds."""
    model, residuals, inner = cached(models("Wan"), correction_pass=correction_pass), [], []
    left = {}

    def note(number, forward, args, kwargs):
        if number == 4:
            residuals.append(args[0] - left[0])
        elif number == 2:
            inner.append(number)
        left[number] = forward(*args, **kwargs)
        return left[number]

    inputs = {
        "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": conditioning("Wan", 1), "negative": conditioning("Wan", 2), "latent_image": empty_latent(VIDEO),
        "correction_steps": "steps:0", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0,
    }  # fmt: skip
    with watched(blocks_of(model.model.diffusion_model, FAMILIES["Wan"]), "forward", note):
        host.run("IECKSampler", model=model, **inputs)
    first, correction, reused = residuals
    assert len(inner) == full_passes
    assert relative(reused, (first, correction)[fed_on]) < 1e-5
    assert (relative(correction, first) < 1e-5) == (correction_pass == "reuse")


def control_for(name, shape, tokens):
    """Return (control, added): the residuals as the host gets them from a ControlNet, and the same for `Restated`.

    They grow with the step's sigma, so that those of a full step differ from those of a cached step.
    """
    values = [noise(1, *shape, seed=seed) for seed in range(7)]
    if name == "SD3":
        lists = {"output": [values[0], None, *values[2:5]]}
        places = {number: (1, 0, value) for number, value in enumerate(lists["output"]) if value is not None}
    else:
        lists = {"input": [values[0], values[1], values[2]], "output": [None, *values[4:7]]}
        places = {number: (0, 0 if number < 3 else tokens, values[number]) for number in (0, 1, 2, 4, 5, 6)}

    def control(sigma):
        return {kind: [value if value is None else value * sigma for value in own] for kind, own in lists.items()}

    def added(number, sigma):
        return (*places[number][:2], places[number][2] * sigma) if number in places else None

    return control, added


@pytest.fixture
def control_net(host):
    """Return control_net(control), which gives a conditioning's ControlNet that returns control(sigma)."""
    import comfy.controlnet

    class Fixed(comfy.controlnet.ControlBase):
        given = []

        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            self.given.append((self.control(t[0]), self.control(t[0])))
            return self.given[-1][0]

    def make(control):
        net = Fixed()
        net.control, net.given = control, []
        return net

    return make


@pytest.mark.parametrize(
    ("name", "branch"), [("Flux", -1), ("Flux", 0), ("Flux", 1), ("Flux", 2), ("SD3", -1), ("SD3", 0), ("SD3", 1)]
)
def test_control_reaches_the_blocks_that_are_run(sample, models, cached, restated, control_net, relative, name, branch):
    """For the other blocks, the kept residual includes the ControlNet residuals of the full step. Flux's ControlNet
    residuals cover only the first part of the picture.
    """
    control, added = control_for(name, (20, 32) if name == "Flux" else (35, 128), 7)
    net = control_net(control)
    own = {"control": net, "control_apply_to_uncond": True}
    result = sample(name, cached(models(name), branch), own=own)
    assert relative(result, restated(name, branch, added=added)) < 1e-5
    assert relative(result, sample(name, cached(models(name), branch))) > 1e-2
    assert relative(sample(name, models(name), own=own), restated(name, branch, full=range(STEPS), added=added)) < 1e-5
    pairs = [(a, b) for given, same in net.given for kind in given for a, b in zip(given[kind], same[kind])]
    assert all(a is b or torch.equal(a, b) for a, b in pairs)


def skip_layers(model, layers, scale, start, end):
    """Apply the host's skip-layer guidance over `Restated`, which leaves the layers out by itself."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    high, low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)

    def guide(args):
        if not low <= args["sigma"][0].item() <= high:
            return args["denoised"]
        options = {**args["model_options"]}
        options["transformer_options"] = {**options["transformer_options"], "skipped": frozenset(layers)}
        skipped = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)[0]
        return args["denoised"] + (args["cond_denoised"] - skipped) * scale

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guide)
    return model


@pytest.mark.parametrize(
    ("name", "double", "single", "layers", "start"),
    [
        ("Flux", "2", "1", {2, 4}, 0.0),
        ("Flux", "1", "2", {1, 5}, 0.0),  # the first block of a cached list, and the last
        ("Flux", "0,1", "3", {0, 1, 6}, 0.3),  # blocks that run, and a guidance that begins on a cached step
        ("SD3", "1,3", None, {1, 3}, 0.0),
    ],
)
def test_skip_layer_guidance(sample, models, cached, relative, name, double, single, layers, start):
    """The evaluation with skipped layers keeps its own residuals, separate from the other evaluation of the same entry."""
    from comfy_extras import nodes_sd3, nodes_slg

    settings = {"scale": 2.0, "start_percent": start, "end_percent": 0.8}

    def guided(model):
        if single is None:
            return nodes_sd3.SkipLayerGuidanceSD3.execute(model, double, **settings).result[0]
        return nodes_slg.SkipLayerGuidanceDiT.execute(model, double_layers=double, single_layers=single, **settings).result[0]

    model = models(name)
    result = sample(name, guided(cached(model)))
    assert torch.equal(result, sample(name, cached(guided(model))))
    one = Restated(name, model, 0)
    with one.patched(skip_layers(model, layers, 2.0, start, 0.8)) as patched:
        assert relative(result, sample(name, patched)) < 1e-5
    assert relative(result, sample(name, cached(model))) > 1e-3


@pytest.mark.parametrize("is_upstream", [True, False])
def test_other_block_replacements_are_called_for_blocks_that_run(sample, models, cached, restated, relative, is_upstream):
    calls = []

    def replace(place, args, extra):
        calls.append(place)
        out = extra["original_block"]({**args, "img": args["img"] * 1.1})
        return {**out, "img": out["img"] * 0.9}

    def replaced(model):
        model = model.clone()
        for place in ("double_block", 0), ("single_block", 1), ("single_block", 3):
            model.set_model_patch_replace(functools.partial(replace, place), "dit", *place)
        return model

    model = models("Flux")
    expected = restated("Flux", 0, replaced(model))
    calls.clear()
    result = sample("Flux", cached(replaced(model)) if is_upstream else replaced(cached(model)))
    assert relative(result, expected) < 1e-5
    counts = {place: calls.count(place) for place in calls}
    assert counts == {("double_block", 0): STEPS, ("single_block", 1): len(FULL), ("single_block", 3): STEPS}


def test_an_evaluation_without_a_condition_has_its_own_feature(sample, models, cached, relative):
    """A guidance may evaluate an entry a second time without one of its conditions."""
    import comfy.samplers

    def guided(model):
        def guide(args):
            less = [{**entry, "model_conds": {**entry["model_conds"]}} for entry in args["cond"]]
            for entry in less:
                del entry["model_conds"]["guidance"]
            options = args["model_options"]
            other = comfy.samplers.calc_cond_batch(args["model"], [less], args["input"], args["sigma"], options)[0]
            return args["denoised"] + (args["cond_denoised"] - other) * 5

        model = model.clone()
        model.set_model_sampler_post_cfg_function(guide)
        return model

    model = models("Flux")
    result = sample("Flux", guided(cached(model)))
    with Restated("Flux", model, 0).patched(guided(model)) as patched:
        assert relative(result, sample("Flux", patched)) < 1e-5


@pytest.mark.parametrize(
    ("node", "settings"),
    [("LTXVSpatioTemporalGuidance", {"scale": 3.0, "blocks": "1,2"}), ("LTXVModalityGuidance", {"modality_scale": 5.0})],
)
def test_guidances_of_ltxv(sample, models, cached, relative, node, settings):
    """These guidances evaluate an entry a second time with a part of the blocks switched off."""
    from comfy_extras import nodes_lt

    model = models("LTX audio-video")

    def guided(model):
        return getattr(nodes_lt, node).execute(model, **settings, start_percent=0.0, end_percent=1.0).result[0]

    result = sample("LTX audio-video", guided(cached(model)))
    with Restated("LTX audio-video", model, 0).patched(guided(model)) as patched:
        assert relative(result, sample("LTX audio-video", patched)) < 1e-5
    assert relative(result, sample("LTX audio-video", cached(model))) > 1e-3


def test_a_conditioning_whose_text_grew_is_evaluated_in_full(sample, models, cached, count_blocks, restated, relative):
    """The kept residual of an entry no longer fits after another node has changed the entry's text during the run."""
    import comfy.conds
    import comfy.samplers

    def growing(model):
        def calculate(args):
            conds = [[{**entry, "model_conds": {**entry["model_conds"]}} for entry in own] for own in args["conds"]]
            if args["sigma"][0] < 0.7:
                for entry in itertools.chain(*conds):
                    entry["model_conds"]["c_crossattn"] = comfy.conds.CONDRegular(noise(1, 9, 12))
            return comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], args["model_options"])

        model = model.clone()
        model.set_model_sampler_calc_cond_batch_function(calculate)
        return model

    model = models("Flux")
    result, counts = count_blocks("Flux", growing(cached(model, interval=9)))
    full = {step for step, block in counts if block == 2}
    assert full == {0, 4}
    assert relative(result, restated("Flux", 0, growing(model), full=full)) < 1e-5


def test_a_guider_with_another_network_for_the_negative(host, models, cached, relative):
    import comfy.samplers
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this host has no guider with two models")
    model, small = models("Flux"), models("Flux", depth=2, depth_single_blocks=2)

    def run(model):
        guider = nodes_custom_sampler.Guider_DualModel(model, small)
        guider.set_conds(conditioning("Flux", 1), conditioning("Flux", 2))
        guider.set_cfg(2.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
        euler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise(*IMAGE), torch.zeros(IMAGE), euler, sigmas, disable_pbar=True, seed=3)

    with Restated("Flux", model, 0).patched() as patched, Restated("Flux", small, 0).patched(patched) as patched:
        expected = run(patched)
    result = run(cached(model))
    assert relative(result, expected) < 1e-5
    assert relative(result, run(model)) > 1e-4


def test_an_error_in_the_run_leaves_no_state(sample, models, cached):
    from comfy.patcher_extension import WrappersMP

    model, kept = models("Flux"), []
    expected = sample("Flux", model)

    def fail(args, extra):
        if args["transformer_options"]["sigmas"][0] < 0.4:
            raise RuntimeError("stop here")
        return extra["original_block"](args)

    def note(executor, *args, **kwargs):
        run = args[5]["iec_deepcache"]
        kept[:] = [weakref.ref(run), *(weakref.ref(part) for own in run.features._slices.values() for _, part in own)]
        return executor(*args, **kwargs)

    failing = cached(model)
    failing.set_model_patch_replace(fail, "dit", "single_block", 3)
    failing.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    with pytest.raises(RuntimeError, match="stop here") as error:
        sample("Flux", failing)
    del error
    gc.collect()
    assert len(kept) == 1 + 2 * 3 and not any(ref() is not None for ref in kept)
    assert torch.equal(sample("Flux", model), expected)


@pytest.mark.parametrize(("name", "branch"), [("Flux", 3), ("Wan", 2), ("AuraFlow", 2)])
def test_unknown_branch_is_refused(models, cached, name, branch):
    total = len(blocks_of(models(name).model.diffusion_model, FAMILIES[name]))
    sentence = rf"^branch: {branch} is not .* this transformer, which has {total} blocks; choose -1 to {(total - 3) // 2}\.$"
    with pytest.raises(ValueError, match=sentence):
        cached(models(name), branch)


def test_a_transformer_with_few_blocks_has_only_the_cheapest_branch(models, cached):
    model = models("Wan").clone()
    network = copy.copy(model.model.diffusion_model)
    network._modules = {**network._modules, "blocks": network.blocks[:2]}
    model.add_object_patch("diffusion_model", network)
    cached(model, -1)
    sentence = r"^branch: 0 is not possible with this transformer, which has 2 blocks; choose -1\.$"
    with pytest.raises(ValueError, match=sentence):
        cached(model)


def test_a_last_block_that_drops_a_stream_leaves_the_other_one():
    """As SD3's last block does. Here both streams have the same shape, so that only their places tell them apart."""
    from pack import pack_module

    streams = pack_module("nodes.host.caching.streams")
    observation, text, picture = streams.Observation(), torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    block = torch.nn.Identity()
    for last in (False, False, True):
        observation.before((), {"text": text, "picture": picture})
        text, picture = text + 1, picture + 1
        observation.after(block, (None if last else text, picture))
    found = observation.streams()
    assert (found.names, found.paths, found.structure) == (("picture",), (("picture",),), (None, streams.Leaf(0)))


def test_the_cheapest_branch_of_seedvr2_is_0(sample, models, cached):
    """Its last layer needs what its first block keeps for it."""
    assert torch.equal(sample("SeedVR2", cached(models("SeedVR2"), -1)), sample("SeedVR2", cached(models("SeedVR2"), 0)))


def test_runs_at_the_cheapest_branch_and_at_others_take_turns(sample, models, cached):
    """SD3's last block passes on less than the others, so the streams of a list depend on the span's end."""
    model = models("SD3")
    expected = {branch: sample("SD3", cached(model, branch)) for branch in (0, -1)}
    for branch in (0, -1, -1, 0):
        assert torch.equal(sample("SD3", cached(model, branch)), expected[branch])


def test_second_cache_is_refused(models, cached):
    with pytest.raises(ValueError, match=r"^model: this MODEL has a cache already"):
        cached(cached(models("Flux")))


def test_a_network_without_a_list_of_blocks_is_refused(models, cached):
    model = models("Wan").clone()
    model.add_object_patch("diffusion_model", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(
        ValueError, match=r"^model: caching needs a U-Net, .* this MODEL is a Sequential, and it has no list of"
    ):
        cached(model)


def test_a_network_that_does_not_run_its_blocks_is_refused_at_its_first_evaluation(sample, models, cached, monkeypatch):
    model = models("Wan")

    def idle(self, x, *args, **kwargs):
        return x

    monkeypatch.setattr(type(model.model.diffusion_model), "forward_orig", idle)
    with pytest.raises(ValueError, match=r"^model: this transformer \(WanModel\) does not run its blocks one after another"):
        sample("Wan", cached(model))


def run_blocks(function):
    """Return a `forward_orig` for Wan's network that is function(blocks, tokens [B, N, 16])."""

    def forward(self, x, *args, **kwargs):
        tokens = x.flatten(2).transpose(1, 2)
        return function(self.blocks, tokens).transpose(1, 2).reshape(x.shape)

    return forward


class Two(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


@pytest.fixture
def simple(monkeypatch):
    """Return simple(blocks, function), which gives a MODEL whose network runs function(blocks, tokens)."""

    def make(blocks, function):
        model = build("Wan")
        network = model.model.diffusion_model
        network.blocks = torch.nn.ModuleList(blocks)
        monkeypatch.setattr(type(network), "forward_orig", run_blocks(function))
        return model

    return make


class Block(torch.nn.Module):
    """A block that returns function(its result)."""

    def __init__(self, function, seed):
        super().__init__()
        self.function, self.inner = function, torch.nn.Linear(16, 16, bias=False)
        self.inner.weight.data = noise(16, 16, seed=seed) / 8

    def forward(self, x):
        return self.function(x + self.inner(x))


@pytest.mark.parametrize(
    ("returns", "function"),
    [
        (lambda x: {"x": x}, lambda blocks, x: functools.reduce(lambda x, block: block(x)["x"], blocks, x)),
        (lambda x: (x, x[0]), lambda blocks, x: functools.reduce(lambda x, block: block(x)[0], blocks, x)),
        (lambda x: torch.cat([x, x[:, :1]], 1), lambda blocks, x: through(blocks, x)[:, : x.shape[1]]),
    ],
    ids=["a dict", "another tensor", "more tokens"],
)
def test_blocks_that_return_other_tensors_than_they_take_are_refused(sample, cached, simple, returns, function):
    model = simple([Block(returns, seed) for seed in range(5)], function)
    assert sample("Wan", model).isfinite().all()
    with pytest.raises(ValueError, match=r"^model: its blocks \(Block\) do not return tensors like those that they take"):
        sample("Wan", cached(model))


def test_blocks_that_return_a_named_tuple(sample, cached, simple, relative):
    """A cached step works, and changes the result."""

    class Pair(Block):
        def forward(self, x, y):
            return Two(x + self.inner(y), y + self.inner(x))

    def function(blocks, x):
        two = Two(x, x.flip(1))
        for block in blocks:
            two = block(*two)
            assert isinstance(two, Two)
        return two.x + two.y

    model = simple([Pair(None, seed) for seed in range(5)], function)
    result, plain = sample("Wan", cached(model, interval=9)), sample("Wan", model)
    assert 1e-4 < relative(result, plain) < 1


def test_a_skip_connection_from_a_skipped_block_is_refused_in_another_packs_network(sample, cached, simple, relative):
    def joined(blocks, x):
        left = []
        for block in blocks:
            x = block(x)
            left.append(x)
        return sum(left)

    def other(function):
        model = simple([Block(lambda x: x, seed) for seed in range(5)], function)
        network = model.model.diffusion_model
        network.__class__ = type("Other", (type(network),), {})  # a class of this file, not of the host
        return model

    model = other(through)
    assert 1e-4 < relative(sample("Wan", cached(model)), sample("Wan", model)) < 1
    assert torch.equal(sample("Wan", cached(model, -1)), sample("Wan", cached(model)))  # a layer behind may need a block
    with pytest.raises(ValueError, match=r"^model: this network \(Other\) uses what its blocks return in more places than"):
        sample("Wan", cached(other(joined)))


def test_two_hundred_runs_over_mixed_models_are_alike_and_leave_nothing(sample, models, cached):
    """Ten models with two settings each, ten times in turn: each result is the same, bit for bit, and no tensor stays."""
    names = ["Flux", "SD3", "Wan", "Lumina 2", "PixArt", "HiDream I1", "AuraFlow", "OmniGen 2", "Qwen-Image", "Stable Cascade"]
    settings = ({"interval": 3, "forecast": "auto"}, {"interval": 2, "branch": 1, "forecast": "quadratic"})
    configurations = [(name, one) for name in names for one in settings]

    def run(name, own):
        return sample(name, cached(models(name), **own), steps=SHORT)

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    first = [run(*one) for one in configurations]
    before = tensors()
    for _ in range(9):
        assert all(torch.equal(run(*one), result) for one, result in zip(configurations, first))
    assert tensors() == before


def test_networks_that_evaluate_an_entry_in_turn_have_their_own_features(sample, models, cached, relative):
    """A guider may evaluate the prompt with a weaker network first, in a part of the run."""
    import comfy.samplers

    model, weak = models("Wan"), models("Wan", num_layers=4)
    weak.pre_run()

    def guided(model):
        def calculate(args):
            (cond, *_), options = args["conds"], args["model_options"]
            inputs = [cond], args["input"], args["sigma"], options
            evaluate = comfy.samplers.calc_cond_batch
            other = evaluate(weak.model, *inputs)[0] if args["sigma"][0] > 0.9 else 0
            own = evaluate(args["model"], *inputs)[0]
            return [own + 0.1 * other for _ in args["conds"]]

        model = model.clone()
        model.set_model_sampler_calc_cond_batch_function(calculate)
        return model

    result = sample("Wan", guided(cached(model, schedule="steps:0")))
    with Restated("Wan", model, 0, full={0}).patched() as patched, Restated("Wan", weak, 0, full={0}).patched(patched) as both:
        assert relative(result, sample("Wan", guided(both))) < 1e-5
    assert relative(result, sample("Wan", guided(model))) > 1e-2


def test_if_all_blocks_are_replaced_steps_are_full_with_a_warning(sample, models, cached, caplog):
    from pack import pack_module

    pack_module("nodes.host.caching.cache_run").warn_once.cache_clear()
    model = models("Wan").clone()
    for number in range(5):
        model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", number)
    with caplog.at_level("WARNING"):
        assert torch.equal(sample("Wan", cached(model)), sample("Wan", models("Wan")))
    assert caplog.text.count("no block can be skipped, because other nodes replace them or the network has too few") == 1


def test_a_wrapper_that_divides_the_batch_makes_steps_full_with_a_warning(sample, models, cached, caplog):
    from comfy.patcher_extension import WrappersMP
    from pack import pack_module

    pack_module("nodes.host.caching.cache_run").warn_once.cache_clear()

    def divide(executor, x, t, context, *args, **kwargs):
        parts = zip(x.split(1), t.split(1), context.split(1))
        return torch.cat([executor(*part, *args, **kwargs) for part in parts])

    def divided(model):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "divide", divide)
        return model

    model = models("Wan")
    with caplog.at_level("WARNING"):
        assert torch.equal(sample("Wan", divided(cached(model))), sample("Wan", divided(model)))
    assert caplog.text.count("divides the network's batch") == 1


def test_a_wrapper_may_name_its_arguments_and_set_attributes_of_blocks(sample, models, cached):
    from comfy.patcher_extension import WrappersMP

    def named(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        return executor(x, t, c_crossattn=c_crossattn, control=control, transformer_options=transformer_options, **kwargs)

    def marked(executor, *args, **kwargs):
        for number, block in enumerate(executor.class_obj.blocks):
            block.place = number
        return executor(*args, **kwargs)

    model = cached(models("Wan"))
    expected = sample("Wan", model)
    model.wrappers[WrappersMP.APPLY_MODEL] = {"named": [named], **model.wrappers[WrappersMP.APPLY_MODEL]}
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "marked", marked)
    assert torch.equal(sample("Wan", model), expected)
    blocks = model.model.diffusion_model.blocks
    assert [block.place for block in blocks] == [0, 1, 2, 3, 4]
    for block in blocks:
        del block.place


def test_blocks_that_pass_on_something_else_than_before_are_observed_again(sample, models, cached, restated, relative):
    """Step 0 finds no tensor at the stored paths and keeps nothing. Step 1 is then full, and observed again."""
    from pack import pack_module

    streams = pack_module("nodes.host.caching.streams")
    model = models("Wan")
    expected = restated("Wan", 0, full={0, 1, 3})
    sample("Wan", cached(model))
    blocks = model.model.diffusion_model.blocks
    last = len(blocks) - 2
    true = streams.known_streams(blocks, last)
    for paths in ((("missing",),), ((9,),), ((0, 1),)):
        streams.remember_streams(blocks, last, dataclasses.replace(true, paths=paths))
        assert relative(sample("Wan", cached(model)), expected) < 1e-5
        assert streams.known_streams(blocks, last) == true


def test_the_largest_list_of_an_unknown_network_is_cached(monkeypatch, sample, models, cached, restated, relative):
    """A network of another pack's class may have its blocks under a name that the host does not use."""
    from pack import pack_module

    block_lists = pack_module("nodes.host.caching.block_lists")
    monkeypatch.setattr(block_lists, "PATHS", {})
    network = models("Wan").model.diffusion_model
    assert [found.path for found in block_lists.find_lists(network)] == ["blocks"]
    assert relative(sample("Wan", cached(models("Wan"))), restated("Wan", 0)) < 1e-5
    assert block_lists.find_lists(torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2))) == []


def test_a_network_with_a_cache_of_its_own_is_evaluated_in_full(monkeypatch, sample, models, cached):
    """SamplerARVideo gives CausalWanModel such a cache. Only later hosts have that class, so the test gives Wan its line."""
    from pack import pack_module

    block_lists = pack_module("nodes.host.caching.block_lists")
    assert block_lists.SPECIAL_CLASSES["CausalWanModel"] == block_lists.SpecialClass(own_cache="ar_state")
    monkeypatch.setitem(block_lists.SPECIAL_CLASSES, "WanModel", block_lists.SPECIAL_CLASSES["CausalWanModel"])
    model = cached(models("Wan"))
    plain = sample("Wan", models("Wan"))
    assert not torch.equal(sample("Wan", model), plain)
    model.model_options["transformer_options"]["ar_state"] = {}
    assert torch.equal(sample("Wan", model), plain)


@pytest.fixture
def traceable_attention(host, monkeypatch):
    """Let the host's networks use PyTorch's attention: the host's default opens a file, which divides a compiled graph."""
    import comfy.ldm.modules.attention

    for module in [module for name, module in sys.modules.items() if name.startswith("comfy.ldm")]:
        if hasattr(module, "optimized_attention"):
            monkeypatch.setattr(module, "optimized_attention", comfy.ldm.modules.attention.attention_pytorch)


@pytest.mark.parametrize("name", ["Wan", "Flux"])
def test_a_network_compiled_as_a_whole(host, sample, models, cached, relative, traceable_attention, graphs, name):
    """Without a cache it is compiled once; with one, once for full steps and once for cached steps, whichever node is first."""

    def compiled(model):
        return host.run("TorchCompileModel", model=model, backend="eager")[0]

    model = models(name)
    plain, expected = sample(name, model), sample(name, cached(model))
    assert relative(expected, plain) > 1e-3
    assert relative(sample(name, compiled(model)), plain) < 1e-5 and graphs() == 1
    for patched in (cached(compiled(model)), compiled(cached(model))):
        for _ in range(2):
            assert relative(sample(name, patched), expected) < 1e-5 and graphs() == 3
    assert relative(sample(name, compiled(model)), plain) < 1e-5 and graphs() == 3


@pytest.mark.parametrize("is_upstream", [True, False])
def test_blocks_compiled_one_by_one(sample, models, cached, relative, traceable_attention, graphs, is_upstream):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = models("Wan")

    def compiled(model):
        model = model.clone()
        set_torch_compile_wrapper(model, backend="eager", keys=[f"diffusion_model.blocks.{number}" for number in range(5)])
        return model

    expected = sample("Wan", cached(model))
    result = sample("Wan", cached(compiled(model)) if is_upstream else compiled(cached(model)))
    assert relative(result, expected) < 1e-5 and graphs() >= 1
    assert relative(sample("Wan", cached(model)), expected) == 0


@pytest.mark.parametrize("name", ["Flux", "Wan"])
def test_weights_keep_their_names_while_a_full_step_is_evaluated(sample, models, cached, name):
    """Another pack's wrapper around the network finds each weight under its own name, and afterwards each list as it was."""
    from comfy.patcher_extension import WrappersMP

    model, seen = cached(models(name)), []

    def note(executor, *args, **kwargs):
        seen.append([key for key, _ in executor.class_obj.named_parameters()])
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "note", note)
    network = model.model.diffusion_model
    before = {place: network.get_submodule(place) for place in FAMILIES[name].lists}
    sample(name, model)
    assert seen[0] == seen[3] == [key for key, _ in network.named_parameters()] != seen[1]
    assert all(network.get_submodule(place) is blocks for place, blocks in before.items())


def test_a_profile_with_the_names_of_an_earlier_version_is_refused(host, models):
    model, family = models("Wan"), FAMILIES["Wan"]
    profile = host.run(
        "IECCalibrateCacheQuant", model=model, positive=conditioning("Wan", 1), negative=conditioning("Wan", 2), seed=3, runs=1,
        latent_image=empty_latent(family.latent), steps=2, cfg=2.0, sampler_name="euler", scheduler="simple", interval=2,
        branch=0,
    )[0]  # fmt: skip
    profile.features = {"double_block.1.img": profile.features["blocks.1.x"]}
    with pytest.raises(ValueError, match=r"^profile: its features have the names that an earlier version of this pack gave"):
        host.run("IECCacheQuant", model=model, profile=profile)


@pytest.mark.parametrize("place", [1, 3])
def test_a_replaced_block_at_the_end_of_a_span_is_run(sample, models, cached, relative, place):
    """A replacement need not call its block, so the span begins after it, or ends before it."""

    def replaced(model):
        model = model.clone()

        def replace(args, extra):
            out = extra["original_block"](args)
            return {**out, "img": out["img"] * 0.9}

        model.set_model_patch_replace(replace, "dit", "double_block", place)
        return model

    model = models("Wan")
    one = Restated("Wan", model, 0)
    one.first, one.last = ({"blocks": 2}, {"blocks": 3}) if place == 1 else ({"blocks": 1}, {"blocks": 2})
    with one.patched(replaced(model)) as patched:
        expected = sample("Wan", patched)
    assert relative(sample("Wan", replaced(cached(model))), expected) < 1e-5
    assert relative(sample("Wan", cached(model)), expected) > 1e-3


def test_weights_in_eight_bits_of_the_host(sample, models, cached, restated, relative):
    """A model that the host keeps in float8 and computes in bfloat16."""
    model = models("Flux", dtype=torch.float8_e4m3fn, computed_in=torch.bfloat16)
    result = sample("Flux", cached(model))
    assert relative(result, restated("Flux", 0, model)) < 1e-5
    assert relative(result, sample("Flux", model)) > 1e-3


REFUSED = {"Trellis2"}  # networks that the cache refuses
NOT_DIFFUSION = {"RTv4", "SAM3Model", "DepthAnything3Net"}  # detectors, which are never sampled


def network_classes():
    """Return the names of the network classes that the host's models have, from the source code of its model_base.py."""
    import comfy.model_base

    nodes = [*ast.walk(ast.parse(inspect.getsource(comfy.model_base)))]
    values = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "unet_model"]
    for node in nodes:
        if isinstance(node, ast.arguments):
            pairs = [*zip([*node.posonlyargs, *node.args][::-1], node.defaults[::-1]), *zip(node.kwonlyargs, node.kw_defaults)]
            values += [default for argument, default in pairs if argument.arg == "unet_model" and default is not None]
    passed_on = "unet_model"  # `unet_model=unet_model` hands an argument on; its default is among the values
    return {ast.unparse(value).rpartition(".")[2] for value in values} - {passed_on}


def test_every_network_class_of_the_host_is_tested(models):
    import comfy.supported_models

    of_host = network_classes()
    names = [name for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family.config)]
    tested = {type(models(name).model.diffusion_model).__name__ for name in names}
    tested.add("UNetModel")  # in test_unets.py
    assert not tested & (REFUSED | NOT_DIFFUSION)
    assert of_host == tested | of_host & (REFUSED | NOT_DIFFUSION)
    diffusion = of_host - NOT_DIFFUSION
    assert len(diffusion - REFUSED) >= 0.95 * len(diffusion)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_network_is_refused_with_its_reason(models, cached, name):
    from pack import pack_module

    special = pack_module("nodes.host.caching.block_lists").SPECIAL_CLASSES
    assert {kind for kind, one in special.items() if one.refused} == REFUSED
    model = models("Wan").clone()
    model.add_object_patch("diffusion_model", type(name, (torch.nn.Module,), {})())
    with pytest.raises(ValueError, match=rf"^model: caching needs .* this MODEL is a {name}, and {special[name].refused}\.$"):
        cached(model)


# These networks take the dtype of a layer's input from the layer's weight.
CAST_TO_A_WEIGHT = {
    "Hunyuan3D 2.1": "t_embedder.mlp.0", "CogVideoX": "patch_embed.text_proj", "Z-Image in pixels": "dec_net.cond_embed",
    "TripoSplat": "t_embedder.mlp.0",
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized(sample, models, plain, rounded, relative, name):
    """Every family's Linear and Conv2d layers can be quantized, except those of families in CAST_TO_A_WEIGHT, whose first
    evaluation is refused. One step runs all layers.
    """
    model = models(name)
    if name in CAST_TO_A_WEIGHT:
        quantized = rounded(model)[0]
        with pytest.raises(ValueError, match=rf"^model: its network takes the dtype of the input of {CAST_TO_A_WEIGHT[name]}"):
            sample(name, quantized, steps=1)
        return
    quantized, reference = rounded(model)
    result, expected = (sample(name, one, steps=1) for one in (quantized, reference))
    assert relative(result, expected) < 1e-4 < relative(expected, plain(name, 1))


# LoRAs that enlarge a weight, as Flux's Canny and Depth LoRAs enlarge the first layer's weight


def with_larger_input(model, source):
    """Return the MODEL, made from `source`, with a LoRA that doubles the input channels of img_in, for an additional
    picture.
    """
    import comfy.weight_adapter

    key, clone = "diffusion_model.img_in.weight", model.clone()
    rows, columns = source.model.diffusion_model.hidden_size, source.model.diffusion_model.in_channels
    down = noise(2, 2 * columns, seed=8) / columns**0.5
    weights = noise(rows, 2, seed=9), down, None, None, None, [rows, 2 * columns]
    assert clone.add_patches({key: comfy.weight_adapter.LoRAAdapter(set(), weights)}) == [key]
    return clone


@pytest.mark.parametrize("settings", [{"keep_sensitive_layers": False}, {"keep_sensitive_layers": True}])
def test_a_lora_before_quantization_may_enlarge_a_weight(host, sample, models, relative, settings):
    model = models("Flux")
    shape = FAMILIES["Flux"].latent
    own = {"concat_latent_image": noise(*shape, seed=7)}
    patched = with_larger_input(model, model)
    expected = sample("Flux", patched, own=own)
    assert relative(sample("Flux", patched, own={"concat_latent_image": noise(*shape, seed=6)}), expected) > 0.01
    quantized = host.run("IECQuantizeModel", model=patched, weight_bits="8", activation_bits="16", **settings)[0]
    assert type(quantized.model.diffusion_model.img_in) is type(model.model.diffusion_model.img_in)
    assert relative(sample("Flux", quantized, own=own), expected) < 0.02
    sample("Flux", patched, own=own)
    # meanwhile, the shared network still holds the larger weight
    plain = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="16", **settings)[0]
    assert relative(sample("Flux", plain), sample("Flux", model)) < 0.02
    with pytest.raises(ValueError, match=r"^model: it cannot be saved, because a LoRA enlarges its weight img_in.weight from"):
        host.run("IECSaveQuantizedModel", model=quantized, name="q")


def test_a_lora_that_enlarges_a_quantized_weight_is_refused_before_patching(host, sample, models):
    quantized = host.run(
        "IECQuantizeModel", model=models("Flux"), weight_bits="8", activation_bits="16", keep_sensitive_layers=False
    )[0]
    expected = sample("Flux", quantized)
    with pytest.raises(ValueError, match=r"^model: a LoRA enlarges the weight of img_in from \(\d+, \d+\) to \(\d+, \d+\)"):
        sample("Flux", with_larger_input(quantized, models("Flux")))
    with pytest.raises(ValueError, match=r"^model: a LoRA enlarges the weight of img_in"):
        host.run("IECSaveQuantizedModel", model=with_larger_input(quantized, models("Flux")), name="q")
    assert torch.equal(sample("Flux", quantized), expected)
