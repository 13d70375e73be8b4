"""CacheQuant's nodes: the calibration compared with a restatement of its definition, files, refusals."""

import copy
import functools
import itertools
import math

import pytest
import torch
from tuned import tuned, with_weights

STEPS, INTERVAL = 6, 2
SAMPLING = {"seed": 11, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}


@pytest.fixture
def empty_latent():
    """A quarter of the model's own size, which is enough for these tests."""
    return {"samples": torch.zeros(2, 3, 8, 8)}


@pytest.fixture(scope="module")
def calibrate(host, model, conditioning):
    def run(source=None, **settings):
        inputs = {
            "positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 8, 8)},
            **SAMPLING, "runs": 1, "interval": INTERVAL, "branch": 0, "forecast": "hold", **settings,
        }  # fmt: skip
        return host.run("IECCalibrateCacheQuant", model=source or model, **inputs)[0]

    return run


def test_the_cheapest_branch_of_a_unet_is_0(calibrate):
    one, other = (calibrate(branch=branch) for branch in (-1, 0))
    assert one.facts == other.facts and torch.equal(one.features[""], other.features[""])


@pytest.fixture(scope="module")
def profile_of(calibrate):
    """Return a cached `calibrate`: it runs once for equal settings, and returns a new copy of the profile each time."""
    made = functools.cache(calibrate)
    return lambda source=None, **settings: copy.deepcopy(made(source, **settings))


@pytest.fixture(scope="module")
def quantized(host, model):
    inputs = {"weight_bits": "4", "activation_bits": "8", "keep_sensitive_layers": True}
    return host.run("IECQuantizeModel", model=model, **inputs)[0]


@pytest.fixture
def features(host, conditioning):
    """Return features(model, runs=1), which gives, for each run, the inputs of the last output block at each step.

    A patch of the test records them in a run of the host's own sampler.
    """

    def run(model, runs=1):
        seen = {}

        def see(h, hsp, options):
            if options["block"] == ("output", 7):
                seen[len(seen)] = h.double()
            return h, hsp

        model = model.clone()
        model.set_model_output_block_patch(see)
        latent = {"samples": torch.zeros(2, 3, 8, 8)}
        for number in range(runs):
            host.common_ksampler(model, 11 + number, STEPS, 2.0, "euler", "normal", *conditioning, latent)
        return [[seen[number * STEPS + step] for step in range(STEPS)] for number in range(runs)]

    return run


def splits():
    """Yield all ways to split the steps that the paper allows."""
    count, shortest, longest = math.ceil(STEPS / INTERVAL), math.ceil(INTERVAL / 2), 2 * INTERVAL
    for later in itertools.combinations(range(1, STEPS), count - 1):
        firsts = [0, *later]
        if all(shortest <= end - first <= longest for first, end in zip(firsts, [*later, STEPS])):
            yield firsts


@pytest.mark.fast
def test_schedule_and_map_are_the_papers(host, calibrate, features, model):
    """The schedule is the best of all splits for the recorded features; the map is the least-squares one."""
    seen = features(model, runs=2)
    profile = calibrate(runs=2)

    def cost(firsts):
        start = [max(first for first in firsts if first <= step) for step in range(STEPS)]
        return sum((run[step] - run[start[step]]).abs().mean().item() for run in seen for step in range(STEPS))

    assert cost(list(profile.full_steps)) == pytest.approx(min(cost(firsts) for firsts in splits()), rel=1e-9)
    assert len({cost(firsts) for firsts in splits()}) > 3
    sigmas = host.run("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)[0]
    torch.testing.assert_close(profile.sigmas.float(), sigmas)
    weights = profile.features[""]
    for step in set(range(STEPS)) - set(profile.full_steps):
        start = max(first for first in profile.full_steps if first <= step)
        x, y = (torch.cat([run[at] for run in seen]).movedim(1, 0).flatten(1) for at in (start, step))
        slope = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1, correction=0)
        torch.testing.assert_close(weights[step, :, 0].double(), slope, rtol=1e-3, atol=1e-4)
        offset = y.mean(1) - slope * x.mean(1)
        torch.testing.assert_close(weights[step, :, 1].double(), offset, rtol=1e-3, atol=1e-4)


def test_auto_counts_a_distance_by_how_far_its_step_moves_the_latent(host, calibrate, features, model):
    """An error of the prediction moves the latent by 1 - sigma' / sigma of itself."""
    (seen,) = features(model)
    sigmas = host.run("BasicScheduler", model=model, scheduler="normal", steps=STEPS, denoise=1.0)[0].tolist()

    def cost(firsts):
        start = [max(first for first in firsts if first <= step) for step in range(STEPS)]
        changes = [(seen[step] - seen[start[step]]).abs().mean().item() for step in range(STEPS)]
        return sum(change * (1 - then / here) for change, here, then in zip(changes, sigmas, sigmas[1:]))

    profile = calibrate(schedule="auto")
    assert cost(list(profile.full_steps)) == pytest.approx(min(map(cost, splits())), rel=1e-9)
    assert len(profile.full_steps) == math.ceil(STEPS / INTERVAL)


def test_a_cached_run_applies_the_calibrated_map(host, profile_of, features, model):
    profile = profile_of()
    run = features(host.run("IECCacheQuant", model=model, profile=profile)[0])[0]
    weights = profile.features[""].double()
    for step in range(STEPS):
        start = max(first for first in profile.full_steps if first <= step)
        expected = run[start] * weights[step, :, 0, None, None] + weights[step, :, 1, None, None]
        torch.testing.assert_close(run[step], expected, rtol=1e-4, atol=1e-4)


def test_corrections_are_fitted_to_another_schedule(host, calibrate, features, model):
    profile = calibrate(schedule="steps:3,4")
    assert profile.full_steps == (0, 3, 4)
    seen, weights = features(model)[0], profile.features[""].double()
    x, y = (seen[at].movedim(1, 0).flatten(1) for at in (4, 5))
    slope = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1, correction=0)
    torch.testing.assert_close(weights[5, :, 0], slope, rtol=1e-3, atol=1e-4)
    node = host.nodes["IECCalibrateCacheQuant"]
    assert [node.validate_inputs(schedule=text) for text in ("dps", "auto", "uniform", "power:3,1.4")] == [True] * 4
    assert node.validate_inputs(schedule="best").startswith("schedule: 'best' is not a known form; write dps, auto, uniform")
    wrong = "schedule: 'power:3,0.5' has a power below 1; write 1 or more (the paper uses 1.2 to 1.6)."
    assert node.validate_inputs(schedule="power:3,0.5") == wrong


def test_calibrated_is_nearer_to_full_precision(host, calibrate, sample, model, relative):
    """The calibrated cache is nearer at the same number of full steps, on noise that the calibration has not seen."""
    latent, steps = {"samples": torch.zeros(2, 3, 16, 16)}, 8
    settings = {"steps": steps, "scheduler": "normal", "latent_image": latent, "seed": 5}
    exact = sample(model, **settings)
    uniform = sample(host.run("IECDeepCache", model=model, interval=INTERVAL, branch=0, forecast="hold")[0], **settings)
    for forecast, share in (("hold", 0.9), ("linear", 0.85)):
        profile = calibrate(runs=2, forecast=forecast, latent_image=latent, steps=steps)
        assert len(profile.full_steps) == steps // INTERVAL
        calibrated = sample(host.run("IECCacheQuant", model=model, profile=profile)[0], **settings)
        assert relative(calibrated, exact) < share * relative(uniform, exact)


def test_quantized_features_are_mapped_on_full_precision(profile_of, features, model, quantized):
    """The trajectory is the full-precision one. x comes from the quantized network at the same latents, y from full
    precision.
    """
    plain, profile = profile_of(), profile_of(quantized, full_precision=model)
    assert profile.facts["quantization"] == "W4A8" and plain.facts["quantization"] == "none"
    assert profile.full_steps == plain.full_steps
    # The schedule reuses the feature at step 1, so that both networks have seen the same latent at step 0.
    plain, profile = (profile_of(source, schedule="uniform", full_precision=model) for source in (model, quantized))
    assert profile.full_steps == plain.full_steps == tuple(range(0, STEPS, INTERVAL))
    x, y = features(quantized)[0][0], features(model)[0][1]
    x, y = (value.movedim(1, 0).flatten(1) for value in (x, y))
    slope = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1, correction=0)
    torch.testing.assert_close(profile.features[""][1, :, 0].double(), slope, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain.features[""], profile.features[""], atol=1e-3)


def test_a_quantized_transformers_residuals_are_mapped_on_full_precision(host, relative):
    """As for a U-Net: x comes from the quantized blocks at step 0, y from full precision at step 1; hooks of the test record
    them.
    """
    from transformer_families import FAMILIES, build, conditioning, empty_latent

    model = build("Flux")
    quantized = host.run("IECQuantizeModel", model=model, weight_bits="4", activation_bits="8", keep_sensitive_layers=True)[0]
    entries, latent = [conditioning("Flux", seed) for seed in (1, 2)], empty_latent(FAMILIES["Flux"].latent)
    sampling = {**SAMPLING, "scheduler": "simple", "steps": 6}
    profile = host.run(
        "IECCalibrateCacheQuant", model=quantized, full_precision=model, positive=entries[0], negative=entries[1],
        latent_image=latent, runs=1, interval=3, branch=0, schedule="steps:3", **sampling,
    )[0]  # fmt: skip

    def sample(model):
        inputs = (sampling[name] for name in ("seed", "steps", "cfg", "sampler_name", "scheduler"))
        return host.common_ksampler(model, *inputs, *entries, latent)[0]["samples"]

    def residuals(model):
        """Return what the double blocks after the first add to the picture's tokens, at each evaluation."""
        first, last = model.model.diffusion_model.double_blocks[1:]
        entered, left = [], []
        hooks = [
            first.register_forward_pre_hook(lambda block, args, given: entered.append(given["img"].double()), with_kwargs=True),
            last.register_forward_hook(lambda block, args, out: left.append(out[0].double())),
        ]
        sample(model)
        for hook in hooks:
            hook.remove()
        return [after - before for before, after in zip(entered, left)]

    ours, full = residuals(quantized), residuals(model)
    assert len(ours) == len(full) == 6
    x, y = ours[0].movedim(-1, 0).flatten(1), full[1].movedim(-1, 0).flatten(1)
    slope = ((x - x.mean(1, keepdim=True)) * (y - y.mean(1, keepdim=True))).mean(1) / x.var(1, correction=0)
    torch.testing.assert_close(profile.features["double_blocks.1.img"][1, :, 0].double(), slope, rtol=1e-3, atol=1e-3)
    exact, calibrated = sample(model), sample(host.run("IECCacheQuant", model=quantized, profile=profile)[0])
    plain = sample(host.run("IECDeepCache", model=quantized, interval=3, branch=0)[0])
    assert relative(calibrated, exact) < relative(plain, exact)


def test_calibrating_a_quantized_model_needs_its_full_precision_source(host, calibrate, profile_of, model, quantized):
    with pytest.raises(ValueError, match=r"^full_precision: the model is quantized, so the MODEL that it was made from is n"):
        calibrate(quantized)
    another = with_weights(model, lambda weight: weight.flip(0))
    eight_bits = host.run("IECQuantizeModel", model=model, weight_bits="8", activation_bits="8", keep_sensitive_layers=True)[0]
    for wrong in (another, quantized, eight_bits):
        with pytest.raises(ValueError, match=r"^full_precision: this is not the MODEL that the quantized one was made from; c"):
            calibrate(quantized, full_precision=wrong)
    one, other = profile_of(), calibrate(full_precision=another)  # full_precision is not used without a quantized model
    assert one.facts == other.facts and torch.equal(one.features[""], other.features[""])


def test_consumer_of_a_quantized_model_is_mapped_too(host, profile_of, sample, model, quantized):
    profile = profile_of(quantized, full_precision=model, correct_consumer=True)
    assert profile.consumer.shape[0] == STEPS and profile.consumer.shape[2] == 2
    settings = {"steps": STEPS, "scheduler": "normal", "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}}
    ours = sample(host.run("IECCacheQuant", model=quantized, profile=profile)[0], **settings)
    profile.consumer[:, :, 0], profile.consumer[:, :, 1] = 1.0, 0.0
    untouched = sample(host.run("IECCacheQuant", model=quantized, profile=profile)[0], **settings)
    profile.consumer = None
    without = sample(host.run("IECCacheQuant", model=quantized, profile=profile)[0], **settings)
    assert torch.equal(untouched, without) and not torch.equal(ours, without)


def test_calibration_leaves_the_model_unchanged(calibrate, sample, model, quantized):
    before = sample(model, steps=2), sample(quantized, steps=2)
    calibrate(quantized, full_precision=model, correct_consumer=True)
    assert torch.equal(sample(model, steps=2), before[0]) and torch.equal(sample(quantized, steps=2), before[1])
    assert not any("forward_comfy_cast_weights" in module.__dict__ for module in model.model.modules())


def test_progress_counts_the_steps_of_all_runs(calibrate, model, quantized, conditioning, progress_of):
    settings = {"runs": 2, "positive_3": conditioning[0], "correct_consumer": True, "steps": 2}
    told = progress_of(lambda: calibrate(quantized, full_precision=model, **settings))
    assert told == [2 * 2 * 2 * 3, *[1] * (2 * 2 * 2 * 3)]


@pytest.mark.parametrize("correction_pass", ["refresh", "keep", "reuse"])
def test_corrections_run_on_a_calibrated_cache(host, profile_of, sample, model, correction_pass):
    model = host.run("IECCacheQuant", model=model, profile=profile_of(), correction_pass=correction_pass)[0]
    settings = {"steps": STEPS, "scheduler": "normal", "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}}
    corrected, plain = (sample(model, correction_steps=steps, **settings) for steps in ("all", "none"))
    assert corrected.isfinite().all() and not torch.equal(corrected, plain)


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_another_model_is_refused(host, profile_of, model, share):
    profile = profile_of()
    assert host.run("IECCacheQuant", model=with_weights(model, lambda weight: weight), profile=profile)
    with pytest.raises(ValueError, match=r"^profile: it was calibrated for another model, a UNetModel with other weights"):
        host.run("IECCacheQuant", model=tuned(model, share), profile=profile)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_same_model_in_another_precision_is_accepted(host, profile_of, precision):
    other = host.run("IECLoadBuiltinModel", precision=precision)[0]
    assert host.run("IECCacheQuant", model=other, profile=profile_of())[0] is not None


def test_a_profile_accepts_its_model_with_a_lora(host, profile_of, sample, model):
    profile, patched = profile_of(), model.clone()
    name = "diffusion_model.input_blocks.0.0.weight"
    weight = model.model.diffusion_model.input_blocks[0][0].weight
    patched.add_patches({name: ("diff", (torch.full_like(weight, 0.5),))})
    settings = {"steps": STEPS, "scheduler": "normal", "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}}
    cached = host.run("IECCacheQuant", model=patched, profile=profile)[0]
    one = sample(cached, **settings)
    again = host.run("IECCacheQuant", model=patched, profile=profile)[0]  # the host has now patched the weight in place
    assert torch.equal(sample(again, **settings), one)


@pytest.mark.parametrize(("sampler", "point"), [("dpm_2", "paper"), ("heun", "paper"), ("euler", "next"), ("euler", "paper")])
def test_maps_are_used_despite_additional_evaluations(host, profile_of, model, sample, sampler, point):
    """Cached steps apply their map to the feature of the full step's own evaluation, or of its correction at the same sigma.

    They do not use an evaluation between two steps, or a correction at the next step's sigma.
    """
    profile = profile_of(sampler_name=sampler)
    weights, own, checked = profile.features[""].double(), {}, []

    def see(h, hsp, options):
        told = options.get("iec")  # set for a step's own evaluation and for corrections
        if told is None or options["block"] != ("output", 7) or abs(told["sigma"] - profile.sigmas[told["step"]]) > 1e-3:
            return h, hsp
        step = told["step"]
        if step in profile.full_steps:
            own[step] = h.double()
        elif told["iteration"] == 0:
            start = max(first for first in profile.full_steps if first <= step)
            expected = own[start] * weights[step, :, 0, None, None] + weights[step, :, 1, None, None]
            torch.testing.assert_close(h.double(), expected, rtol=1e-4, atol=1e-4)
            checked.append(step)
        return h, hsp

    cached = host.run("IECCacheQuant", model=model, profile=profile)[0]
    cached.set_model_output_block_patch(see)
    latent = {"samples": torch.zeros(2, 3, 8, 8)}
    settings = {"steps": STEPS, "scheduler": "normal", "latent_image": latent, "correction_steps": "first:2"}
    sample(cached, sampler_name=sampler, evaluation_point=point, **settings)
    assert len(set(checked)) >= 3


def test_a_profile_is_refused_if_other_layers_are_quantized(host, profile_of, sample, model, quantized):
    inputs = {"weight_bits": "4", "activation_bits": "8", "keep_sensitive_layers": False}
    every = host.run("IECQuantizeModel", model=model, **inputs)[0]
    cached = host.run("IECCacheQuant", model=every, profile=profile_of(quantized, full_precision=model))[0]
    with pytest.raises(ValueError, match="with quantization W4A8, but this MODEL has quantization W4A8 of"):
        sample(cached, steps=STEPS, scheduler="normal")


def test_a_conditioning_with_its_own_timestep_range(host, calibrate, conditioning):
    """The first part of the denoising has another prompt than the rest: two entries, one of which starts later."""
    early, late = (
        host.run("ConditioningSetTimestepRange", conditioning=conditioning[0], start=start, end=end)[0]
        for start, end in ((0.0, 0.45), (0.45, 1.0))
    )
    profile = calibrate(positive=early + late, forecast="linear")
    assert profile.features[""].isfinite().all()


def test_a_calibration_with_nan_is_refused(calibrate, model):
    broken = model.clone()
    broken.set_model_output_block_patch(lambda h, hsp, options: (h * float("nan"), hsp))
    with pytest.raises(ValueError, match=r"^model: it returned NaN or infinity in a calibration run"):
        calibrate(broken)


def test_a_sampler_that_leaves_the_schedule_is_refused(calibrate):
    with pytest.raises(
        ValueError, match=r"^sampler_name: it does not evaluate the network at the start of step \d+ of the sch"
    ):
        calibrate(sampler_name="dpm_fast")


def test_another_quantization_is_refused(host, profile_of, sample, model, quantized):
    settings = {"steps": STEPS, "scheduler": "normal"}
    for source, of in ((quantized, profile_of()), (model, profile_of(quantized, full_precision=model))):
        cached = host.run("IECCacheQuant", model=source, profile=of)[0]
        with pytest.raises(ValueError, match=r"^profile: it was calibrated with quantization (none|W4A8), but this MODEL"):
            sample(cached, **settings)


def test_the_full_steps_are_an_output_for_correction_steps(host, profile_folder, sample, model, conditioning):
    """The full steps are given as text for other nodes. With this text as correction_steps, a sampler corrects exactly these
    steps.
    """
    inputs = {
        "positive": conditioning[0], "negative": conditioning[1], "latent_image": {"samples": torch.zeros(2, 3, 8, 8)},
        **SAMPLING, "runs": 1, "interval": INTERVAL, "branch": 0,
    }  # fmt: skip
    profile, text = host.run("IECCalibrateCacheQuant", model=model, **inputs)
    assert text == "steps:" + ",".join(map(str, profile.full_steps)) and len(profile.full_steps) == STEPS // INTERVAL
    host.run("IECSaveCacheProfile", profile=profile, name="told")
    assert host.run("IECLoadCacheProfile", profile_name="told.safetensors")[1] == text
    reports = []
    cached = host.run("IECCacheQuant", model=model, profile=profile)[0]
    sample(cached, reports, steps=STEPS, scheduler="normal", correction_steps=text)
    assert [step.step for step in reports[0].steps if step.corrected] == list(profile.full_steps)


@pytest.mark.parametrize("leftover", ["enable", "disable"])
def test_profile_accepts_part_of_its_schedule_but_no_other(host, profile_of, sample, model, leftover):
    cached = host.run("IECCacheQuant", model=model, profile=profile_of())[0]
    with pytest.raises(ValueError, match=r"^profile: it was calibrated for 6 steps of euler on normal from sigma"):
        sample(cached, steps=STEPS, scheduler="karras")
    latent = {"samples": torch.full((2, 3, 16, 16), 0.2)}
    advanced = {
        "add_noise": "enable", "noise_seed": 3, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal",
        "start_at_step": 2, "end_at_step": 5, "return_with_leftover_noise": leftover,
    }  # fmt: skip
    conditions = dict(zip(("positive", "negative"), (host.run("IECClassLabel", labels=text)[0] for text in ("face", "none"))))
    result = host.run("KSamplerAdvanced", model=cached, latent_image=latent, **conditions, **advanced)[0]["samples"]
    assert result.isfinite().all()


def test_cached_model_is_refused(host, calibrate, profile_of, model):
    cached = host.run("IECDeepCache", model=model, interval=2, branch=0)[0]
    with pytest.raises(ValueError, match=r"^model: this MODEL has a cache already"):
        calibrate(cached)
    with pytest.raises(ValueError, match=r"^model: this MODEL has a cache already"):
        host.run("IECCacheQuant", model=cached, profile=profile_of())


def test_an_interrupt_ends_the_calibration(host, calibrate, sample, model, monkeypatch):
    import comfy.utils

    class Stop(Exception):
        pass

    class Bar:
        def __init__(self, total):
            self.left = 5

        def update(self, value):
            self.left -= 1
            if not self.left:
                raise Stop

    expected = sample(model, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "ProgressBar", Bar)
        with pytest.raises(Stop):
            calibrate()
    assert torch.equal(sample(model, steps=2), expected)


@pytest.mark.fast
def test_profile_is_saved_and_loaded(host, profile_folder, calibrate, sample, model):
    profile = calibrate(forecast="linear")
    assert host.run("IECSaveCacheProfile", profile=profile, name="small/net")[0] is profile
    assert [path.name for path in profile_folder.rglob("*") if path.is_file()] == ["net.safetensors"]
    loaded = host.run("IECLoadCacheProfile", profile_name="small/net.safetensors")[0]
    settings = {"steps": STEPS, "scheduler": "normal"}
    one, other = (sample(host.run("IECCacheQuant", model=model, profile=each)[0], **settings) for each in (profile, loaded))
    assert torch.equal(one, other)


def test_a_failed_save_keeps_the_older_file(host, profile_folder, profile_of, monkeypatch):
    profile = profile_of()
    host.run("IECSaveCacheProfile", profile=profile, name="net")
    before = (profile_folder / "net.safetensors").read_bytes()

    def fail(self, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(profile), "save", fail)
    with pytest.raises(ValueError, match=r"^name: 'net' cannot be written to models/iec_profiles \(disk full\)"):
        host.run("IECSaveCacheProfile", profile=profile, name="net")
    assert [path.name for path in profile_folder.iterdir()] == ["net.safetensors"]
    assert (profile_folder / "net.safetensors").read_bytes() == before


def test_a_model_that_hides_the_conditioning_is_refused(calibrate, model):
    """A cache evaluates such a MODEL in full; a calibration would see no step at all."""

    def hide(apply_model, arguments):
        options = {k: v for k, v in arguments["c"]["transformer_options"].items() if k not in ("uuids", "cond_or_uncond")}
        return apply_model(arguments["input"], arguments["timestep"], **{**arguments["c"], "transformer_options": options})

    hiding = model.clone()
    hiding.set_model_unet_function_wrapper(hide)
    for settings in ({}, {"schedule": "uniform"}):
        with pytest.raises(ValueError, match=r"^model: another node on it calls the network without passing the step"):
            calibrate(hiding, **settings)
