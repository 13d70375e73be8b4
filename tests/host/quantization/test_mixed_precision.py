"""IECCalibrateWeights with weight_bits mixed: its measurements, its choices, and the error of the images."""

import contextlib
import functools

import pytest
import torch
from pack import pack_module

SAMPLING = {"steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"}
# A 3 x 3 layer, Linear layers, one of which has no effect (there is one token to attend to), and a 1 x 1 layer with large
# errors.
FEW = "mid*.0.in_* mid*.proj_in mid*.attn2.to_q out*.7.0.skip_*"


@pytest.fixture
def inputs(host, conditioning):
    label = functools.partial(host.run, "IECClassLabel")
    return {
        "positive": label(labels="heart, person")[0], "positive_2": conditioning[0], "negative": conditioning[1], "runs": 1,
        "seed": 5, "latent_image": {"samples": torch.zeros(2, 3, 8, 8)}, **SAMPLING,
    }  # fmt: skip


@pytest.fixture
def calibrate(host, model, inputs):
    """Return calibrate(source, **settings), which gives (the MODEL, its table), by default of a few layers, with 16-bit
    activations.
    """

    def run(source=None, **settings):
        given = {
            "weight_bits": "mixed", "activation_bits": "16", "keep_sensitive_layers": True, "rank": "auto", "include": FEW,
            **inputs, **settings,
        }  # fmt: skip
        return host.run("IECCalibrateWeights", model=source or model, **given)

    return run


@pytest.fixture
def draw(host, conditioning):
    """Return draw(model), which gives latents of the host's own sampler, with another seed and other classes than the
    calibration.
    """

    def run(model):
        arguments = [SAMPLING[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]
        return host.common_ksampler(model, 31, *arguments, *conditioning, {"samples": torch.zeros(2, 3, 8, 8)})[0]["samples"]

    return run


def layers_of(model):
    """Return {name: layer} of a MODEL's quantized layers."""
    return {name: layer for name, layer in model.model.diffusion_model.named_modules() if hasattr(layer, "packing")}


def rows_of(table):
    """Return {name of a layer: the other cells} of the node's table, in its order."""
    rows = (line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[2:])
    return {name: cells for name, *cells in rows}


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


@contextlib.contextmanager
def weight_of(model, name, weight):
    """Give a layer of a network another weight within the context."""
    layer = model.model.diffusion_model.get_submodule(name)
    before, layer.weight = layer.weight, torch.nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        layer.weight = before


def predictions(host, model, inputs):
    """Return [(latent, sigma)] of the evaluations in the first prompt's run, and predict(latent, sigma) with guidance."""
    import comfy.model_management
    import comfy.samplers

    places, arguments = [], [inputs[name] for name in ("steps", "cfg", "sampler_name", "scheduler")]

    def note(args):
        places.append((args["input"].clone(), args["sigma"].clone()))
        return args["denoised"]

    seen = model.clone()
    seen.set_model_sampler_post_cfg_function(note)
    prompts = [inputs["positive"], inputs["negative"]]
    host.common_ksampler(seen, inputs["seed"], *arguments, *prompts, inputs["latent_image"])
    comfy.model_management.load_models_gpu([model])

    def denoised(x, sigma, entry):
        ((cond, more),) = entry
        cond = cond.expand(len(x), -1, -1) if cond.shape[0] == 1 else cond
        label = more["pooled_output"].expand(len(x), -1)
        return model.model.apply_model(x, sigma, c_crossattn=cond, y=label)

    def predict(x, sigma):
        positive, negative = (denoised(x, sigma, entry) for entry in prompts)
        return negative + inputs["cfg"] * (positive - negative)

    return places, predict


@pytest.mark.fast
def test_errors_equal_those_of_guided_predictions_with_one_layer_quantized(host, model, calibrate, inputs):
    """The errors are compared with the test's own evaluations, in which one layer has a floating-point weight.

    At this image size, no layer cancels the change of another in a step; where layers do, the estimate is too large.
    """
    inputs = {**inputs, "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}}
    made, table = calibrate(average_bits=4.5, latent_image=inputs["latent_image"])
    rows = rows_of(table)
    places, predict = predictions(host, model, inputs)
    assert len(places) == SAMPLING["steps"] and set(rows) > {"middle_block.1.proj_in"}
    expected = [predict(*place) for place in places]
    checked = 0
    for name, layer in layers_of(made).items():
        chosen, at_4, at_8, _ = rows[name]
        with weight_of(model, name, layer.packing.dequantize(layer.weight)):
            changes = [(predict(*place) - one) / one.norm() for place, one in zip(places, expected)]
        told = float({"4 bits": at_4, "8 bits": at_8}[chosen])
        assert told == pytest.approx((sum(changes) / len(changes)).norm().item(), rel=1e-3, abs=2e-6), name
        checked += told > 1e-5
    assert checked > 1
    to_q = next(cells for name, cells in rows.items() if name.endswith("attn2.to_q"))
    assert to_q[:3] == ["4 bits", "0.000000", "0.000000"]


def test_the_budget_is_kept_and_spent_on_sensitive_layers(model, calibrate):
    for average, of_skip in ((4.2, "8 bits"), (5.0, "32 bits")):
        made, table = calibrate(average_bits=average)
        rows, layers = rows_of(table), layers_of(made)
        names = set(rows)
        full = {name: model.model.diffusion_model.get_submodule(name).weight for name in names}
        sizes = {name: layers[name].weight.nbytes if name in layers else full[name].nbytes for name in names}
        bits = 8 * sum(sizes.values()) / sum(weight.numel() for weight in full.values())
        assert bits <= average and made.model.iec_quantization == f"W{bits:.2f}A16, mixed, GPTQ, only {FEW}"
        for name, (chosen, *_, megabytes) in rows.items():
            kinds = {"int4": "4 bits", "int8": "8 bits"}
            assert chosen == (kinds[layers[name].packing.format.kind] if name in layers else "32 bits")
            assert float(megabytes) == pytest.approx(sizes[name] / 2**20, abs=6e-4)
        assert next(iter(rows)) == "output_blocks.7.0.skip_connection" and rows[next(iter(rows))][0] == of_skip
        assert f"{bits:.2f} bits per weight, expected error of a prediction" in table.splitlines()[-1]


def test_images_are_nearer_than_with_all_at_4_bits_at_little_more(host, model, calibrate, draw, monkeypatch):
    monkeypatch.setattr(pack_module("nodes.host.quantization.prediction_errors"), "EVALUATIONS", 2)
    outer = {"include": "input_blocks.1.* input_blocks.3.* output_blocks.5.* output_blocks.6.* output_blocks.7.*"}
    expected = draw(model)
    alike = relative(draw(calibrate(weight_bits="4", rank="0", **outer)[0]), expected)
    mixed = {average: relative(draw(calibrate(average_bits=average, **outer)[0]), expected) for average in (4.6, 6.0)}
    assert mixed[4.6] < 0.7 * alike and mixed[6.0] < 0.75 * mixed[4.6]


def test_an_error_budget_is_met_with_the_fewest_bits(calibrate):
    loose, tight = (calibrate(budget="error", most_error=error)[0].model.iec_quantization for error in (0.02, 0.002))
    bits = [float(name[1:].split("A")[0]) for name in (loose, tight)]
    assert bits[0] < bits[1] < 8.2
    told = float(calibrate(budget="error", most_error=0.002)[1].split("expected error of a prediction ")[1].split(" ")[0])
    assert told <= 0.002


def test_only_layers_with_4_bits_have_a_branch(calibrate):
    made, table = calibrate(average_bits=7.0, rank="8")
    ranks = {layer.packing.format.kind: layer.packing.format.rank for layer in layers_of(made).values()}
    assert ranks == {"int4": 8, "int8": 0} and ", GPTQ, rank 8, only" in made.model.iec_quantization
    assert any(cells[0] == "4 bits" for cells in rows_of(table).values())


def test_impossible_budgets_are_refused(calibrate, host):
    for settings, message in (
        ({"average_bits": 3.0}, r"^average_bits: 3 is less than the smallest possible, 4\.\d\d with scales and branches"),
        ({"average_bits": 32.0}, r"^average_bits: 32 is enough for all layers to stay unquantized; choose a smaller number\.$"),
        ({"budget": "error", "most_error": 0.0}, r"^most_error: no layer can be quantized within 0; allow a larger error\.$"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(include="mid*.proj_in out*.7.0.skip_*", **settings)
    node = host.nodes["IECCalibrateWeights"]
    assert node.validate_inputs(weight_bits="mixed", budget="error") is True
    assert node.validate_inputs(budget="best").startswith("budget: ")
    assert host.nodes["IECQuantizeModel"].validate_inputs(weight_bits="mixed").startswith("weight_bits: ")


def test_caches_before_the_node_do_not_affect_the_measurement(host, model, calibrate):
    """Neither the pack's cache nor the host's may repeat its kept results."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    small = {"average_bits": 5.0, "include": "mid*.proj_in out*.7.0.skip_*"}
    plain = rows_of(calibrate(**small)[1])
    deep = host.run("IECDeepCache", model=model, interval=3, branch=0, schedule="uniform")[0]
    easy = EasyCacheNode.execute(model, reuse_threshold=10.0, start_percent=0.0, end_percent=1.0, verbose=False).result[0]
    for source in (deep, easy):
        errors = {name: float(cells[1]) for name, cells in rows_of(calibrate(source, **small)[1]).items()}
        for name, cells in plain.items():
            assert 0.3 < errors[name] / float(cells[1]) < 3


def test_hooks_and_wrappers_of_the_measurement_are_removed(model, calibrate, draw, monkeypatch):
    import comfy.model_management

    before = draw(model)
    checks, check = [], comfy.model_management.throw_exception_if_processing_interrupted

    def interrupted():
        checks.append(1)
        if len(checks) == stop:
            raise comfy.model_management.InterruptProcessingException
        check()

    stop = 0
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    calibrate(include="mid*.proj_in")
    stop, checks[:] = len(checks) - 1, []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(include="mid*.proj_in")
    hooks = [layer for layer in model.model.diffusion_model.modules() if layer._forward_pre_hooks or layer._forward_hooks]
    assert not hooks and not any("iec" in key for wrappers in model.wrappers.values() for key in wrappers)
    assert torch.equal(draw(model), before)


def test_progress_counts_the_measurements(calibrate, progress_of):
    told = progress_of(lambda: calibrate(include="mid*.proj_in out*.7.0.skip_*", steps=6))
    total = 2 * 6 + 2 * 2 + 6 + 4 * 2 * 2  # runs; layers in 4 and 8 bits; the measured run and its further evaluations
    assert told == [total, *[1] * total]


@pytest.mark.parametrize("sampler_name", ["heun", "dpmpp_2s_ancestral"])
def test_samplers_with_several_evaluations_per_step(calibrate, progress_of, sampler_name):
    few = {"include": "mid*.proj_in out*.7.0.skip_*", "sampler_name": sampler_name, "steps": 2}
    told = progress_of(lambda: calibrate(**few))
    assert told == [2 * 2 + 4 + 2 + 2 * 4, *[1] * (len(told) - 1)] and len(told) == 1 + told[0]


def test_nan_predictions_are_refused(model, calibrate):
    """The NaN values are in the prediction with one layer quantized; a patch that detects this layer's hooks makes them."""
    broken = model.clone()
    layer = broken.model.diffusion_model.get_submodule("middle_block.1.proj_in")

    def put_in(h, options):
        return h * float("nan") if layer._forward_hooks else h

    broken.set_model_output_block_patch(lambda h, hsp, options: (put_in(h, options), hsp))
    sentence = r"^model: a prediction with its layer middle_block\.1\.proj_in quantized, or in full precision, contains NaN"
    with pytest.raises(ValueError, match=sentence):
        calibrate(broken, include="mid*.proj_in")


def test_a_saved_and_loaded_model_is_bit_identical(host, calibrate, draw, tmp_path, monkeypatch):
    import folder_paths

    (folder := tmp_path / "diffusion_models").mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(folder)], {".safetensors"}))
    made = calibrate(average_bits=5.0, activation_bits="8")[0]
    host.run("IECSaveQuantizedModel", model=made, name="mixed")
    back = host.run("IECLoadQuantizedModel", model_name="mixed.safetensors")[0]
    assert back.model.iec_quantization == made.model.iec_quantization and ", mixed, GPTQ" in made.model.iec_quantization
    kinds = [{name: layer.packing.format for name, layer in layers_of(one).items()} for one in (made, back)]
    assert kinds[0] == kinds[1] and {fmt.kind for fmt in kinds[0].values()} == {"int4", "int8"}
    assert torch.equal(draw(back), draw(made))


def test_a_transformer(host):
    """The transformer is Flux; the budget also covers its first and last blocks."""
    from transformer_families import FAMILIES, build, conditioning, empty_latent

    model = build("Flux")
    made, table = host.run(
        "IECCalibrateWeights", model=model, weight_bits="mixed", activation_bits="8", keep_sensitive_layers=True, rank="auto",
        average_bits=6.0, positive=conditioning("Flux", 1), negative=conditioning("Flux", 2), seed=5, runs=1,
        latent_image=empty_latent(FAMILIES["Flux"].latent), **{**SAMPLING, "scheduler": "simple", "steps": 2},
    )  # fmt: skip
    kinds = [layer.packing.format.kind for layer in layers_of(made).values()]
    assert {"int4", "int8"} <= set(kinds) and len(rows_of(table)) >= len(kinds) > 30


def test_the_report_ranks_layers_by_prediction_error(host, model, inputs, calibrate):
    """Its errors are the ones that the calibration measured for the same choice."""
    made, table = calibrate(weight_bits="4", rank="0")
    assert table == f"4 layers: W4A16, GPTQ, only {FEW}"
    measured = rows_of(calibrate()[1])
    text = host.run("IECQuantizationReport", model=made, full_precision=model, **inputs)[0]
    rows = rows_of(text)
    assert {name: cells[2] for name, cells in rows.items()} == {name: cells[1] for name, cells in measured.items()}
    assert next(iter(rows)) == "output_blocks.7.0.skip_connection"
