"""The real ComfyUI in this process: its modules, with the pack loaded by its own loader."""

import copy
import pathlib
import types

import comfyui
import pytest
import torch
from pack import pack_module

FOLDER = pathlib.Path(__file__).parent
SHARED_MODELS = "builtin_model", "small_model"  # fixtures of MODELs that last as long as the process
# stock nodes that are not in the host's nodes.py
EXTRAS = (
    "custom_sampler", "model_advanced", "chroma_radiance", "pag", "perpneg", "differential_diffusion", "advanced_samplers",
    "freelunch", "hypertile", "model_downscale", "sag", "tomesd", "torch_compile", "context_windows", "easycache", "eps",
)  # fmt: skip


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run each test of this folder, with its fixtures, in inference mode, as the host's executor runs nodes.

    Tests of other folders, for which pytest calls this hook too, are not affected.
    """
    with torch.inference_mode(FOLDER in item.path.parents):
        return (yield)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    """Return ComfyUI on the CPU: `nodes` has all node classes by id, the pack's included; `run(id, ...)` gives one node's
    outputs.
    """
    known = comfyui.load_nodes(*EXTRAS, cpu=True)
    import folder_paths
    import nodes

    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("previews")))

    def run(node, **inputs):
        cls = known[node]
        if hasattr(cls, "define_schema"):
            return cls.execute(**inputs).result
        return getattr(cls(), cls.FUNCTION)(**inputs)

    return types.SimpleNamespace(nodes=known, run=run, common_ksampler=nodes.common_ksampler)


@pytest.fixture(autouse=True)
def no_patch_stays_on_the_model(request):
    """Undo the patches of a test.

    The host writes them into the weights and the model that all clones share, and restores these only when another clone is
    loaded.
    """
    models = [request.getfixturevalue(name) for name in SHARED_MODELS if name in request.fixturenames]
    yield
    for model in models:
        if model.backup or model.object_patches_backup:
            model.unpatch_model()


@pytest.fixture(scope="session")
def builtin_model(host):
    """Return the built-in U-Net as MODEL, in float32."""
    return host.run("IECLoadBuiltinModel", precision="float32")[0]


@pytest.fixture(scope="session")
def model(builtin_model):
    """Return the MODEL that the fixtures below sample, unless a file overrides it."""
    return builtin_model


@pytest.fixture(scope="session")
def build_small(host):
    """Return build_small(dtype), which gives the built-in U-Net with half of its levels and fixed random weights, as MODEL."""
    import comfy.model_patcher
    from random_weights import randomize

    builtin, cpu = pack_module("nodes.host.builtin_model"), torch.device("cpu")

    class SmallModel(builtin.BuiltinModel):
        pass

    class Small(builtin.BuiltinConfig):
        model_class = SmallModel

        def __init__(self):
            super().__init__()
            half = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1]}
            self.unet_config = {**self.unet_config, **half, "transformer_depth_output": [0, 0, 1, 1]}

    builtin.CONFIG_OF_CLASS["SmallModel"] = Small  # for reading files of this model

    def build(dtype):
        model = builtin._empty_model(Small(), dtype)
        randomize(model.diffusion_model, seed=0)
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return build


@pytest.fixture(scope="session")
def small_model(build_small):
    """Return the model of `build_small` in float32.

    It is for tests that go through single layers or that hold for any network: such a test file uses it as `model`.
    """
    return build_small(torch.float32)


@pytest.fixture(scope="session")
def conditioning(host):
    """Return (positive, negative) for a batch of two."""
    return host.run("IECClassLabel", labels="face, flag")[0], host.run("IECClassLabel", labels="none")[0]


@pytest.fixture
def empty_latent():
    """Return the start of `sample` and `stock_sample`: two images of half the model's own size, at half of the work.

    A file whose tests are about the images themselves overrides it.
    """
    return {"samples": torch.zeros(2, 3, 16, 16)}


@pytest.fixture
def sample(host, conditioning, empty_latent):
    """Return sample(model, **settings), which gives the latents of an IECKSampler run of two images.

    The run's RunReport is appended to the list `report`, if given.
    """

    def run(model, report=None, **settings):
        inputs = {
            "seed": 7,
            "steps": 8,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "ddim_uniform",
            "positive": conditioning[0],
            "negative": conditioning[1],
            "latent_image": empty_latent,
            "denoise": 1.0,
            "correction_steps": "none",
            "lambda_": 0.5,
            "max_iterations": 1,
            "tolerance": 0.0,
            **settings,
        }
        latent, reports = host.run("IECKSampler", model=model, **inputs)
        if report is not None:
            report.append(reports[0])
        return latent["samples"]

    return run


@pytest.fixture(scope="module")
def made_reports():
    """Return the reports that `reports` copies, once a test has made them."""
    return []


@pytest.fixture
def reports(made_reports, sample, model):
    """Return the RunReports of two runs with latents, one without correction and one with all steps corrected."""
    if not made_reports:
        sample(model, made_reports, label="full", keep_latents=True, steps=4)
        sample(model, made_reports, label="other", keep_latents=True, steps=4, correction_steps="all")
    return copy.deepcopy(made_reports)


@pytest.fixture
def stock_sample(host, conditioning, empty_latent):
    """Return stock_sample(model, **settings), which gives the same run by the host's own KSampler."""

    def run(model, seed=7, steps=8, cfg=2.0, sampler_name="euler", scheduler="ddim_uniform", denoise=1.0):
        run = host.common_ksampler(model, seed, steps, cfg, sampler_name, scheduler, *conditioning, empty_latent, denoise)
        return run[0]["samples"]

    return run


@pytest.fixture
def advanced(host):
    """Return advanced(guider, sampler, **settings), which gives latents of SamplerCustomAdvanced.

    sampler: a name, a sampler function or a SAMPLER.
    """
    import comfy.samplers

    def run(guider, sampler="euler", seed=7, steps=3, scheduler="ddim_uniform", denoise=1.0, latent=None):
        if isinstance(sampler, str):
            sampler = host.run("KSamplerSelect", sampler_name=sampler)[0]
        elif callable(sampler):
            sampler = comfy.samplers.KSAMPLER(sampler)
        schedule = {"scheduler": scheduler, "steps": steps, "denoise": denoise}
        return host.run(
            "SamplerCustomAdvanced", noise=host.run("RandomNoise", noise_seed=seed)[0], guider=guider, sampler=sampler,
            sigmas=host.run("BasicScheduler", model=guider.model_patcher, **schedule)[0],
            latent_image=latent or {"samples": torch.zeros(2, 3, 16, 16)},
        )[0]["samples"]  # fmt: skip

    return run


@pytest.fixture
def count_evaluations():
    """Return count_evaluations(model), which gives a clone and a list that gets an entry for every call of the network."""
    from comfy.patcher_extension import WrappersMP

    def counted(model):
        calls = []

        def count(executor, x, *args, **kwargs):
            calls.append(x.shape[0])
            return executor(x, *args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "count", count)
        return model, calls

    return counted


@pytest.fixture
def progress_of(host, monkeypatch):
    """Return progress_of(run), which gives the updates of the host's progress bars during run(): the total of each bar, then
    its increments.
    """
    import comfy.utils

    def of(run):
        told = []

        class Bar:
            def __init__(self, total):
                told.append(total)

            def update(self, value):
                told.append(value)

        with monkeypatch.context() as patch:
            patch.setattr(comfy.utils, "ProgressBar", Bar)
            run()
        return told

    return of


@pytest.fixture
def profile_folder(host, tmp_path, monkeypatch):
    """Return the folder that replaces models/iec_profiles."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "iec_profiles", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def relative(x, reference):
    """Return the relative error of two tensors, in float64."""
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


@pytest.fixture(name="relative")
def relative_fixture():
    return relative


@pytest.fixture
def graphs():
    """Return graphs(), which gives the number of graphs compiled since the test began."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def rounded(host):
    """Return rounded(model), which gives (a MODEL with all layers quantized, the MODEL with the same rounded weights as
    patches).
    """

    def make(model):
        bits = {"weight_bits": "8", "activation_bits": "16", "keep_sensitive_layers": False}
        quantized = host.run("IECQuantizeModel", model=model, **bits)[0]
        layers = {
            name: layer for name, layer in quantized.model.diffusion_model.named_modules() if hasattr(layer, "convert_weight")
        }
        assert len(layers) > 10
        values = {f"diffusion_model.{name}.weight": layer.convert_weight(layer.weight) for name, layer in layers.items()}
        reference = model.clone()
        assert len(reference.add_patches({key: ("set", (value,)) for key, value in values.items()})) == len(values)
        return quantized, reference

    return make
