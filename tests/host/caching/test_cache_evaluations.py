"""Check that each evaluation reuses its own feature, of the right step, however the network is called.

The network is called through tiles, windows, samplers and caches of other packs; and evaluations that these leave out are
handled.
"""

import functools
import math
import types
from pathlib import Path

import pytest
import torch
from pack import pack_module
from transformer_families import build, conditioning, noise

STEPS = 5


@pytest.fixture(scope="module")
def flux(host):
    return build("Flux")


class Given:
    """A NOISE with given values."""

    seed = 0

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, latent):
        return self.noise


@pytest.fixture
def draw(host):
    """Return draw(model, noise, sampler="euler", cfg=2.0, sigmas=None), which gives the latents of a run from this noise.

    sampler: a name, a sampler function or a SAMPLER.
    """
    import comfy.samplers

    def run(model, noise, sampler="euler", cfg=2.0, sigmas=None):
        if model.model.diffusion_model.__class__.__name__ == "Flux":
            positive, negative = (conditioning("Flux", seed) for seed in (1, 2))
        else:
            positive, negative = (host.run("IECClassLabel", labels=label)[0] for label in ("face", "none"))
        guider = host.run("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg)[0]
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        sampler = comfy.samplers.KSAMPLER(sampler) if callable(sampler) else sampler
        if sigmas is None:
            sigmas = host.run("BasicScheduler", model=model, scheduler="simple", steps=STEPS, denoise=1.0)[0]
        latent = {"samples": torch.zeros_like(noise)}
        return host.run(
            "SamplerCustomAdvanced", noise=Given(noise), guider=guider, sampler=sampler, sigmas=sigmas, latent_image=latent
        )[0]["samples"]  # fmt: skip

    return run


@pytest.fixture
def cached(host):
    return lambda model, interval=3, **settings: host.run(
        "IECDeepCache", model=model, interval=interval, branch=0, **{"forecast": "hold", "schedule": "uniform", **settings}
    )[0]


@pytest.fixture(params=["U-Net", "Flux"])
def network(request, model, flux):
    """Return (MODEL, noise for two images)."""
    return (model, noise(2, 3, 16, 16)) if request.param == "U-Net" else (flux, noise(2, 16, 8, 16))


def with_function(model, function):
    model = model.clone()
    model.set_model_unet_function_wrapper(function)
    return model


def twice(value):
    return torch.cat([value, value]) if torch.is_tensor(value) else value


def one_after_the_other(apply_model, arguments):
    """Evaluate the left half of the latent, then the right half."""
    halves = arguments["input"].chunk(2, dim=-1)
    return torch.cat([apply_model(half, arguments["timestep"], **arguments["c"]) for half in halves], dim=-1)


def at_once(apply_model, arguments):
    """Evaluate both halves in one batch, with the conditioning arguments repeated for each half."""
    halves = torch.cat(arguments["input"].chunk(2, dim=-1))
    told = {name: twice(value) for name, value in arguments["c"].items()}
    return torch.cat(apply_model(halves, twice(arguments["timestep"]), **told).chunk(2), dim=-1)


@pytest.mark.parametrize("tiles", [one_after_the_other, at_once])
def test_each_tile_has_its_own_feature(draw, cached, relative, network, tiles):
    """Each tile is cached as if it were a separate latent in a separate run."""
    model, start = network
    result = draw(cached(with_function(model, tiles)), start)
    apart = torch.cat([draw(cached(model), half) for half in start.chunk(2, dim=-1)], dim=-1)
    assert relative(result, apart) < 1e-5
    assert relative(result, draw(with_function(model, tiles), start)) > 1e-3


def test_tiles_in_other_batches_are_not_confused(draw, cached, relative, network):
    """If a cached step batches the tiles differently from the full step, it must be evaluated in full."""
    model, start = network
    calls = []

    def tiles(apply_model, arguments):
        calls.append(1)
        return (at_once if len(calls) == 1 else one_after_the_other)(apply_model, arguments)

    result = draw(cached(with_function(model, tiles), schedule="steps:0,2,3,4"), start)
    assert relative(result, draw(with_function(model, one_after_the_other), start)) < 1e-5


def test_tiles_that_move_are_refused(draw, cached, model):
    class SpotDiffusion:  # as in Tiled Diffusion and its forks
        def __call__(self, apply_model, arguments):
            return one_after_the_other(apply_model, arguments)

    start = noise(1, 3, 8, 8)
    tiled = with_function(model, SpotDiffusion())
    assert draw(tiled, start).isfinite().all()
    with pytest.raises(
        ValueError, match=r"^model: SpotDiffusion moves its tiles from step to step, but DeepCache \(IEC\) reuses"
    ):
        draw(cached(tiled), start)


def test_each_window_of_animatediff_has_its_own_feature(draw, cached, relative, network):
    """The frames are the images of a batch; every second evaluation begins with the last window."""
    import comfy.samplers

    model, _ = network
    start, calls = noise(4, *network[1].shape[1:]), []

    def windows(arguments):
        calls.append(1)
        out = [torch.zeros_like(arguments["input"]) for _ in arguments["conds"]]
        for frames in [[0, 1], [2, 3]][:: 1 if len(calls) % 2 else -1]:
            options = dict(arguments["model_options"])
            options["transformer_options"] = {**options["transformer_options"], "ad_params": {"sub_idxs": frames}}
            of = [arguments[name][frames] for name in ("input", "sigma")]
            for whole, part in zip(out, comfy.samplers.calc_cond_batch(model.model, arguments["conds"], *of, options)):
                whole[frames] = part
        return out

    model = model.clone()
    windowed = cached(model)
    windowed.set_model_sampler_calc_cond_batch_function(windows)
    result = draw(windowed, start)
    apart = torch.cat([draw(cached(model), part) for part in start.chunk(2)])
    assert relative(result, apart) < 1e-5
    assert relative(result, draw(model, start)) > 1e-3


def test_a_feature_from_before_the_last_full_step_is_not_reused(draw, cached, network):
    """The negative is missing in the third step, which is full: so the fourth step must be evaluated in full."""
    import comfy.samplers

    model, start = network

    def guided(schedule):
        calls, caching = [], cached(model, schedule=schedule)

        def third_without_negative(arguments):
            calls.append(1)
            positive, negative = arguments["conds"]
            conds = [positive, None if len(calls) == 3 else negative]
            of = (arguments[name] for name in ("input", "sigma", "model_options"))
            return comfy.samplers.calc_cond_batch(model.model, conds, *of)

        caching.set_model_sampler_calc_cond_batch_function(third_without_negative)
        return draw(caching, start)

    assert torch.equal(guided("steps:0,2"), guided("steps:0,2,3"))


def leaving_out(names):
    def call(apply_model, arguments):
        options = arguments["c"]["transformer_options"]
        told = {name: value for name, value in options.items() if name not in names}
        return apply_model(arguments["input"], arguments["timestep"], **{**arguments["c"], "transformer_options": told})

    return call


@pytest.mark.parametrize("name", ["uuids", "cond_or_uncond", "sigmas", "sample_sigmas"])
def test_one_missing_option_does_not_change_a_cached_run(draw, cached, network, name):
    model, start = network
    expected = draw(cached(model), start)
    assert torch.equal(draw(cached(with_function(model, leaving_out([name]))), start), expected)


@pytest.mark.parametrize("names", [("uuids", "cond_or_uncond"), ("iec_deepcache",)])
def test_without_required_options_steps_are_full_with_one_warning(draw, cached, network, caplog, names):
    caching = pack_module("nodes.host.caching.cache_run")
    caching.warn_once.cache_clear()
    model, start = network
    assert torch.equal(draw(cached(with_function(model, leaving_out(names))), start), draw(model, start))
    (told,) = [record.message for record in caplog.records if "another node calls the network" in record.message]
    assert told.endswith("these evaluations are done in full.")


# to which step an evaluation belongs

RISING = [14.6, 7.0, 3.0, 1.0, 5.0, 2.0, 0.5, 0.0]
FALLING = [14.6, 9.0, 5.0, 3.0, 1.5, 0.9, 0.4, 0.0]


@pytest.fixture
def evaluated(draw, cached, model):
    """Return evaluated(sampler, sigmas), which gives for each of the sampler's evaluations whether it was in full."""
    middle = model.model.diffusion_model.middle_block[0]

    def run(sampler, sigmas):
        from comfy.patcher_extension import WrappersMP

        deep = []

        def count(executor, *args, **kwargs):
            deep.append(False)
            return executor(*args, **kwargs)

        watched = cached(model)
        watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "count", count)
        hook = middle.register_forward_hook(lambda *_: deep.__setitem__(-1, True))
        try:
            draw(watched, noise(1, 3, 8, 8), sampler, cfg=1.0, sigmas=torch.tensor(sigmas))
        finally:
            hook.remove()
        return deep

    return run


def sampler_of(name):
    import comfy.samplers

    return comfy.samplers.sampler_object(name).sampler_function


def without_callback(name):
    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return sampler_of(name)(model, x, sigmas, extra_args=extra_args, disable=disable)

    return function


def lying(name, amount):
    """Return a sampler that gives the network less than the actual sigma, lowest in the middle, as Detail Daemon does."""

    def function(model, x, sigmas, extra_args=None, callback=None, disable=None):
        steps = len(sigmas) - 1

        def shown(x, sigma, **extra):
            place = next(step for step in range(steps) if sigma[0] >= sigmas[step + 1])
            place += float((sigmas[place] - sigma[0]) / (sigmas[place] - sigmas[place + 1]))
            return model(x, sigma * (1 - amount * math.sin(math.pi * place / steps)), **extra)

        shown.inner_model = model.inner_model
        return sampler_of(name)(shown, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    return function


SAMPLERS = ["euler", "dpmpp_2m", "lcm", "heun", "dpm_2"]


def in_full(name, steps):
    """Return the numbers of a sampler's full evaluations over a schedule that ends at 0, cached with an interval of 3.

    Heun's second evaluation is at the next step's sigma and counts as the next step's; dpm_2's is between the two sigmas and
    counts as its own step's. The last step has one evaluation.
    """
    at = {"heun": lambda step: {2 * step - 1, 2 * step}, "dpm_2": lambda step: {2 * step, 2 * step + 1}}
    numbers = {number for step in range(0, steps, 3) for number in at.get(name, lambda step: {step})(step)}
    return sorted(number for number in numbers if 0 <= number < (2 * steps - 1 if name in at else steps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_counted_in_order_on_a_schedule_that_rises_again(evaluated, name):
    for sigmas in (FALLING, RISING):
        found = evaluated(name, sigmas)
        assert [number for number, full in enumerate(found) if full] == in_full(name, 7)


def test_a_sampler_that_does_not_call_back(evaluated):
    for sigmas in (FALLING, RISING):
        found = evaluated(without_callback("euler"), sigmas)
        assert [number for number, full in enumerate(found) if full] == in_full("euler", 7)


@pytest.mark.parametrize("amount", [0.2, 0.35])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_counted_in_order_for_a_sampler_that_passes_another_sigma(evaluated, name, amount):
    found = evaluated(lying(name, amount), [*torch.linspace(2.6, -3, 16).exp().tolist(), 0.0])
    assert [number for number, full in enumerate(found) if full] == in_full(name, 16)


def test_a_host_function_replaced_by_another_pack_is_supported(evaluated):
    """The function has the name of the host's, but evaluates twice per step, and the host's evaluates once."""
    heun = sampler_of("heun")
    while hasattr(heun, "__wrapped__"):
        heun = heun.__wrapped__
    sample_euler = types.FunctionType(heun.__code__, heun.__globals__, "sample_euler", heun.__defaults__)
    found = evaluated(sample_euler, FALLING)
    assert [number for number, full in enumerate(found) if full] == in_full("heun", 7)


def test_a_guider_called_several_times_per_evaluation(evaluated, monkeypatch):
    """LanPaint does this: it keeps the host's sampler function, and evaluates more by itself."""
    import comfy.samplers

    plain = comfy.samplers.KSAMPLER.sample

    def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
        class Thinking:
            def __getattr__(self, name):
                return getattr(model_wrap, name)

            def __call__(self, *given, **more):
                for _ in range(3):
                    model_wrap(*given, **more)
                return model_wrap(*given, **more)

        return plain(self, Thinking(), sigmas, extra_args, *args, **kwargs)

    sample.__module__ = plain.__module__
    monkeypatch.setattr(comfy.samplers.KSAMPLER, "sample", sample)
    found = evaluated("euler", FALLING)
    assert [number // 4 for number, full in enumerate(found) if full] == [0] * 4 + [3] * 4 + [6] * 4


def test_a_sampler_that_continues_another_run(evaluated):
    """Its class samples over the last sigmas only, and counts steps from 0."""
    import comfy.samplers

    class Resumed(comfy.samplers.KSAMPLER):
        def sample(self, model_wrap, sigmas, *args, **kwargs):
            return super().sample(model_wrap, sigmas[2:], *args, **kwargs)

    found = evaluated(Resumed(sampler_of("euler")), FALLING)
    assert [number + 2 for number, full in enumerate(found) if full] == [2, 3, 6]  # there is no feature at first


def test_a_wrapper_that_changes_the_samplers_sigmas(draw, cached, model):
    from comfy.patcher_extension import WrappersMP

    def later(executor, guider, sigmas, *args, **kwargs):
        return executor(guider, sigmas[2:], *args, **kwargs)

    deep, watched = [], cached(model)
    watched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "later", later)
    hook = model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: deep.append(1))
    try:
        draw(watched, noise(1, 3, 8, 8), "euler", cfg=1.0, sigmas=torch.tensor(FALLING))
    finally:
        hook.remove()
    assert len(deep) == 3  # the first evaluation, whatever its step number, and steps 3 and 6


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_a_guider_that_calls_the_network_in_its_own_way(host, cached, model, name):
    """It bypasses the host's wrappers around a prediction; the steps are known nevertheless."""
    import comfy.samplers

    class OwnWay(comfy.samplers.CFGGuider):
        def __call__(self, x, timestep, model_options=None, seed=None):
            conds = self.conds.get("positive")
            return comfy.samplers.calc_cond_batch(self.inner_model, [conds], x, timestep, model_options)[0]

    positive, start = host.run("IECClassLabel", labels="face")[0], noise(1, 3, 8, 8)

    def sample(kind, model):
        guider = kind(model)
        guider.set_conds(positive, positive)
        guider.set_cfg(1.0)
        sigmas = torch.tensor(FALLING)
        return guider.sample(start, torch.zeros_like(start), comfy.samplers.sampler_object(name), sigmas, disable_pbar=True)

    expected = sample(comfy.samplers.CFGGuider, cached(model))
    assert torch.equal(sample(OwnWay, cached(model)), expected)
    assert not torch.equal(sample(OwnWay, model), expected)


def test_with_one_evaluation_per_step_nothing_is_read_from_the_device(draw, cached, flux):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(model):
        with torch.inference_mode(False), torch.no_grad(), Reads() as counted:
            draw(model, noise(1, 16, 8, 16).clone(), "euler")
        return counted.count

    assert reads(cached(flux)) == reads(flux) > 0


def test_a_forecast_uses_the_step_numbers_of_the_iec_sampler(host, draw, cached, model, relative):
    model = cached(model, forecast="linear")
    told = host.run("IECApply", model=model, correction_steps="none", lambda_=0.5, max_iterations=1, tolerance=0.0)[0]
    start, sigmas = noise(1, 3, 8, 8), torch.tensor(RISING)
    assert relative(draw(told, start, sigmas=sigmas), draw(model, start, sigmas=sigmas)) < 1e-6


# other packs' caches


def test_the_hosts_cache_is_refused_with_a_calibration_or_a_profile(host, model):
    from comfy.patcher_extension import WrappersMP

    both = host.run("EasyCache", model=model, reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)[0]
    positive, negative = (host.run("IECClassLabel", labels=label)[0] for label in ("face", "none"))
    settings = {
        "positive": positive, "negative": negative, "latent_image": {"samples": torch.zeros(1, 3, 8, 8)}, "seed": 0, "steps": 3,
        "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "runs": 1, "interval": 2, "branch": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^model: both EasyCache and Calibrate CacheQuant \(IEC\) are on this MODEL"):
        host.run("IECCalibrateCacheQuant", model=both, **settings)
    profile = host.run("IECCalibrateCacheQuant", model=model, **settings)[0]
    with pytest.raises(ValueError, match=r"^model: both EasyCache and CacheQuant \(IEC\) are on this MODEL"):
        host.run("IECCacheQuant", model=both, profile=profile)
    profile.channel_dim = -1
    with pytest.raises(ValueError, match=r"^profile: it was calibrated for another model"):
        host.run("IECCacheQuant", model=model, profile=profile)
    assert WrappersMP.OUTER_SAMPLE not in model.wrappers


@pytest.mark.parametrize("other", ["EasyCache", "LazyCache"])
def test_the_hosts_cache_is_refused_in_either_order(host, draw, cached, network, other):
    model, start = network
    settings = {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
    put = functools.partial(host.run, other, **settings)
    expected = draw(model, start)
    sentence = (
        rf"^model: both {other} and DeepCache \(IEC\) are on this MODEL, and neither knows what the other leaves out; use"
    )
    with pytest.raises(ValueError, match=sentence):
        cached(put(model=model)[0])
    both = put(model=cached(model))[0]
    with pytest.raises(ValueError, match=sentence):
        draw(both, start)
    assert torch.equal(draw(model, start), expected)


@pytest.mark.parametrize("is_behind", [True, False])
@pytest.mark.parametrize("left_out", [{1, 2, 4}, {0, 1, 2, 4}])
def test_another_cache_may_skip_the_network(draw, cached, network, left_out, is_behind):
    """If the other cache leaves out all cached steps, DeepCache has nothing to do."""
    from comfy.patcher_extension import WrappersMP

    model, start = network

    def put(model):
        steps = []

        def leave_out(executor, x, *args, **kwargs):
            sigma = args[-1]["sigmas"][0].item()
            if sigma not in steps:
                steps.append(sigma)
            return x * 0.5 if len(steps) - 1 in left_out else executor(x, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another cache", leave_out)
        return model

    result = draw(put(cached(model)) if is_behind else cached(put(model)), start)
    assert torch.equal(result, draw(put(model), start))


# information that the cache, an IEC sampler and other packs exchange

IEC = {"lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}


def test_cache_and_report_number_dpm_fast_steps_equally(sample, cached, model):
    """dpm_fast takes 5 steps when 12 are requested; the cache ends after 60% of the noise levels."""
    from comfy.patcher_extension import WrappersMP

    reports, seen = [], []

    def note(executor, x, timestep, model_options, *args, **kwargs):
        seen.append([model_options["transformer_options"].get("iec"), False])
        return executor(x, timestep, model_options, *args, **kwargs)

    watched = cached(model, interval=2, end_percent=0.6)
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "note", note)
    middle = model.model.diffusion_model.middle_block[0]
    hook = middle.register_forward_hook(lambda *_: seen[-1].__setitem__(1, True))
    try:
        sample(watched, reports, steps=12, cfg=1.0, sampler_name="dpm_fast", scheduler="normal", correction_steps="full")
    finally:
        hook.remove()
    own = [(told["step"], full) for told, full in seen if (told["position"], told["iteration"]) == (told["step"], 0)]
    assert [step for step, _ in own] == list(range(5))
    assert [step for step, full in own if full] == [step.step for step in reports[0].steps if step.corrected] == [0, 2, 3, 4]


def test_steps_are_numbered_per_part_if_a_sampler_samples_in_parts(host, cached, draw, model):
    """The IEC sampler numbers the steps of each part from 0, and the cache uses these numbers.

    The steps after the cache's end (sigmas 0.9 and 0.4) are full.
    """
    import comfy.samplers

    plain = comfy.samplers.sampler_object("euler")
    corrected, _ = host.run("IECSampler", sampler=plain, correction_steps="none", **IEC)
    deep = []

    def in_parts(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for part in (sigmas[:4], sigmas[3:]):
            x = corrected.sampler_function(model, x, part, extra_args=extra_args, disable=disable)
        return x

    def each(apply_model, arguments):
        deep.append(False)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    hook = model.model.diffusion_model.middle_block[0].register_forward_hook(lambda *_: deep.__setitem__(-1, True))
    try:
        watched = with_function(cached(model, interval=9, end_percent=0.6), each)
        draw(watched, noise(1, 3, 8, 8), in_parts, cfg=1.0, sigmas=torch.tensor(FALLING))
    finally:
        hook.remove()
    assert 0.9 < model.get_model_object("model_sampling").percent_to_sigma(0.6) < 1.5
    assert [number for number, full in enumerate(deep) if full] == [0, 3, 5, 6]


def test_features_of_moving_windows_do_not_accumulate(draw, cached, network):
    import comfy.samplers

    model, _ = network
    calls, slots, names = [], [], []

    def windows(arguments):
        frames = [len(calls), len(calls) + 1]
        calls.append(1)
        options = dict(arguments["model_options"])
        options["transformer_options"] = {**options["transformer_options"], "ad_params": {"sub_idxs": frames}}
        of = [arguments[name] for name in ("input", "sigma")]
        return comfy.samplers.calc_cond_batch(model.model, arguments["conds"], *of, options)

    def note(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        run = args[5]["iec_deepcache"]
        slots.append(len(run.features._slices))
        names.append(len(getattr(run, "_kept", ())))
        return result

    windowed = cached(model, interval=1)
    windowed.set_model_sampler_calc_cond_batch_function(windows)
    kind = pack_module("nodes.host.caching.cached_model").cache_kind(model).wrapper_type
    windowed.wrappers[kind] = {"note": [note], **windowed.wrappers[kind]}  # around the cache
    draw(windowed, noise(2, *network[1].shape[1:]))
    assert len(slots) == STEPS and len(set(slots)) == len(set(names)) == 1


def test_without_the_run_plan_iec_options_mark_the_evaluations(host, draw, cached, network):
    """A guider that calls the network directly lacks the evaluation numbers of the run's plan."""
    model, start = network
    told = host.run("IECApply", model=cached(model), correction_steps="none", **IEC)[0]
    expected = draw(told, start)
    assert torch.equal(draw(with_function(told, leaving_out(["iec_run_plan"])), start), expected)
    assert not torch.equal(expected, draw(model, start))


def others(kind, key):
    return {"transformer_options": {"wrappers": {kind: {key: [print]}}}}


@pytest.mark.parametrize(
    ("model_options", "replaced", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"model_function_wrapper": print}, False, True),
        (others("diffusion_model", "TeaCache"), False, True),
        (others("diffusion_model", None), False, True),
        (others("predict_noise", "TeaCache"), False, True),
        (others("apply_model", "torch.compile"), False, False),
        (others("apply_model", "iec_activation_scales"), False, False),
        ({"transformer_options": {"wrappers": {"apply_model": {"removed": []}}}}, False, False),
    ],
)
def test_one_rule_decides_whether_other_packs_take_part(host, model_options, replaced, expected):
    calls, network = pack_module("nodes.host.sampling.network_calls"), torch.nn.Linear(2, 2)
    if replaced:
        network.forward = network.forward
    assert calls.others_take_part(model_options, network) is expected
    assert pack_module("nodes.host.correction.exactness").is_exact(network, model_options) is not expected
    extra_args = {"model_options": model_options}
    assert (calls.NetworkCalls().watch(extra_args, network) is not extra_args) is expected


def test_nfe_excludes_evaluations_answered_by_a_model_function(sample, model):
    times, reports = [], []

    def every_other(apply_model, arguments):
        times.append(1)
        answers = len(times) % 2 == 0
        return arguments["input"] * 0.5 if answers else apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    sample(with_function(model, every_other), reports, steps=6, cfg=1.0, scheduler="normal")
    assert len(times) == 6 and reports[0].nfe == 3


@pytest.mark.parametrize(("other", "is_refused"), [("iec_activation_scales", True), ("another cache", False), (None, False)])
def test_a_network_that_does_not_run_its_blocks_is_refused_unless_another_pack_takes_part(
    draw, cached, flux, monkeypatch, other, is_refused
):
    """Another pack may be the cause.

    other: the key of an additional wrapper; None: a function around the model is set instead.
    """
    from comfy.patcher_extension import WrappersMP

    monkeypatch.setattr(flux.model.diffusion_model, "forward_orig", lambda img, *args, **kwargs: img)
    watched = cached(flux)
    if other is None:
        watched = with_function(watched, lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    else:
        watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, other, lambda executor, *args, **kwargs: executor(*args, **kwargs))
    if is_refused:
        with pytest.raises(ValueError, match=r"^model: this transformer \(Flux\) does not run its blocks one after another"):
            draw(watched, noise(1, 16, 8, 16))
    else:
        assert draw(watched, noise(1, 16, 8, 16)).isfinite().all()


def test_the_name_iec_is_written_in_one_place(host):
    folder = Path(pack_module("nodes.host.inputs").__file__).parent
    assert [file.name for file in folder.rglob("*.py") for _ in range(file.read_text().count('"iec"'))] == ["network_calls.py"]
