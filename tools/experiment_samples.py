"""Images of the runs of experiments: sampled by the pack's own nodes, one chunk at a time, and kept as files.

A chunk of eight images takes less than a minute on one core. Its noise depends only on its size and number, so that an image
does not depend on who samples it and on what was sampled before. `sampled` lets other processes make chunks, and `made` makes
one chunk. A chunk also keeps the features of its images, which take as long as a few steps of sampling.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import pathlib
import signal
import tempfile
import time
from dataclasses import asdict, replace

import benchmark
import classifier
import comfyui
import effects
import emoji
import experiment_ray
import imagenet
import pack
import processes
import safetensors
import torch
import train_smooth
from experiment_rows import CALIBRATION_RUNS, CHUNK, CONTROLS, SPLIT, Run
from safetensors.torch import save
from training import sha256

MOST_AT_ONCE = 256  # images, on a GPU
SEED = 1000  # of the first chunk's noise; each next chunk adds one
ASSETS = comfyui.ROOT / "nodes/assets"
WEIGHTS = {"unet": ASSETS / "emoji32.safetensors", "transformer": ASSETS / "emoji32_flow.safetensors"}
STOCK = ("custom_sampler", "eps")  # node files of the host
MEASURED_BY = (classifier.WEIGHTS, imagenet.REAL_FEATURES)


def digest_of(thing):
    """Return a digest of 12 hexadecimal digits of a thing that JSON can hold."""
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:12]


def calibration_runs(known, run):
    """Return the inputs of a calibrating node for a run's cache."""
    per_prompt = CALIBRATION_RUNS // len(benchmark.PROMPTS)
    return benchmark.calibration_inputs(known, run.steps, per_prompt, run.sampler, run.scheduler, run.cfg)


def weights_path(run):
    """Return the file of a run's weights. Raises ValueError if the weights must be trained first."""
    if run.weights == Run.weights:
        return WEIGHTS[run.architecture]
    if not train_smooth.is_there(run.weights):
        raise ValueError(f"weights: {run.key} needs weights that are not there; `make smooth` trains them in half an hour.")
    return train_smooth.path(run.weights)


def weights_digest(run):
    """Return the digest of a run's weights; for weights outside the repository, the digest of their recipe."""
    is_builtin = run.weights == Run.weights
    return sha256(WEIGHTS[run.architecture]) if is_builtin else digest_of(train_smooth.recipe(run.weights))


@contextlib.contextmanager
def weights_of(architecture, path):
    """Return a context in which a built-in model is loaded with the weights of a file."""
    builtin = pack.pack_module("nodes.host.builtin_model")
    config = builtin.ARCHITECTURES[architecture]
    before, config.path = config.path, path
    try:
        yield
    finally:
        config.path = before


def digest(run):
    """Return the digest of a run's images, 12 hexadecimal digits.

    It covers the run's settings, the seeds, the calibration inputs of a cache, the model's weights, and the networks that make
    the features.
    """
    calibration = [CALIBRATION_RUNS, *benchmark.PROMPTS, benchmark.CALIBRATION_SEED] if run.calibration else []
    return digest_of([asdict(run), SEED, calibration, weights_digest(run), *map(sha256, MEASURED_BY)])


def row_digest(row):
    """Return the digest of a row: its images, their number, and all that they are measured against."""
    return digest_of([row.images, row.chunk, *map(digest, (row.run.sampled, *row.run.references.values()))])


def shape(chunk):
    """Return the shape of a chunk's latents."""
    return (chunk.size, 3, 32, 32)


class Sampler:
    """Sample runs through the nodes of a ComfyUI that is loaded into this process."""

    def __init__(self, known, weights=weights_path):
        """Keep the nodes. known: the nodes by id. weights(run): the file of a run's weights."""
        self._known, self._weights, self._models = known, weights, {}

    def run(self, node, **inputs):
        """Return the outputs of a node."""
        return self._known[node].execute(**inputs).result

    def model(self, run):
        """Return the MODEL of a run; each MODEL is made once."""
        if run.model not in self._models:
            self._models[run.model] = self._cached(self._quantized(run), run)
        return self._models[run.model]

    def _quantized(self, run):
        with weights_of(run.architecture, self._weights(run)):
            (model,) = self.run("IECLoadBuiltinModel", precision="float32", architecture=run.architecture)
        if run.quantization == "none":
            return model
        weights, activations = run.quantization.removeprefix("W").split("A")
        bits = {"weight_bits": weights, "activation_bits": activations}
        return self.run("IECQuantizeModel", model=model, keep_sensitive_layers=True, **bits)[0]

    def _cached(self, model, run):
        cache = {"interval": run.interval, "branch": 0, "forecast": run.forecast}
        if run.interval == 1:
            return model
        if run.cache == "deepcache":
            return self.run("IECDeepCache", model=model, schedule="uniform", **cache)[0]
        runs = calibration_runs(self._known, run)
        profile = self.run("IECCalibrateCacheQuant", model=model, **runs, **cache)[0]
        return self.run("IECCacheQuant", model=model, profile=profile)[0]

    def chunk(self, chunk):
        """Return (latents float32 [size, 3, 32, 32], evaluations of the network, seconds) of a Chunk. Raises ValueError if a
        latent is not finite.
        """
        run, first, seed = chunk.run, chunk.number * chunk.size, SEED + chunk.number
        with self._controlled(run, seed) as model:
            begin = time.perf_counter()
            labels, empty = self._labels(first, chunk.size), {"samples": torch.zeros(shape(chunk))}
            latent, nfe = self._sample_of(run)(model, run, labels, empty, seed)
            seconds = time.perf_counter() - begin
        if not bool(latent["samples"].isfinite().all()):
            raise ValueError(f"{run.key}: a latent of images {first} to {first + chunk.size - 1} is not finite.")
        return latent["samples"].float().cpu(), nfe, seconds

    def _sample_of(self, run):
        if run.control == "last step alone":
            return self._but_the_last_exact
        return self._by_timesteps if run.scheduler == "quadratic" else self._by_scheduler

    def _labels(self, first, size):
        """Return the conditioning of `size` images from number `first` on; the classes repeat in order."""
        classes = list(emoji.CLASSES)
        labels = ", ".join(classes[(first + place) % len(classes)] for place in range(size))
        return {name: self.run("IECClassLabel", labels=text)[0] for name, text in (("positive", labels), ("negative", "none"))}

    @contextlib.contextmanager
    def _controlled(self, run, seed):
        """Return the MODEL of a run with its control."""
        model = self.model(run)
        if run.control == "shrunk":
            yield effects.shrunk(model, run.lambda_)
        elif run.control.startswith("epsilon"):
            yield self.run("Epsilon Scaling", model=model, scaling_factor=float(run.control.removeprefix("epsilon")))[0]
        elif run.control == "averaged":
            full = self.model(replace(run, quantization="none"))
            rounding = effects.Rounding(model, full, seed)
            try:
                yield effects.evaluated(model, 2, rounding)
            finally:
                rounding.round_weights()
        else:
            yield model

    def _correction(self, run):
        return {
            "correction_steps": run.correction_steps, "evaluation_point": run.evaluation_point, "lambda_": run.lambda_,
            "max_iterations": run.max_iterations, "tolerance": 0.0,
        }  # fmt: skip

    def _by_scheduler(self, model, run, labels, latent, seed):
        """Return (LATENT, evaluations of the network) of KSampler (IEC)."""
        latent, reports = self.run(
            "IECKSampler", model=model, **labels, latent_image=latent, denoise=1.0, seed=seed, steps=run.steps, cfg=run.cfg,
            sampler_name=run.sampler, scheduler=run.scheduler, **self._correction(run),
        )  # fmt: skip
        return latent, reports[0].nfe * CONTROLS[run.control]

    def _by_timesteps(self, model, run, labels, latent, seed):
        """Return the same over the authors' timesteps."""
        sigmas = quadratic_sigmas(model.get_model_object("model_sampling"), run.steps)
        latent, nfe = self._by_sigmas(model, run, labels, latent, seed, sigmas)
        return latent, nfe * CONTROLS[run.control]

    def _but_the_last_exact(self, model, run, labels, latent, seed):
        """Return the same with every step but the last one split."""
        (sigmas,) = self.run("BasicScheduler", model=model, scheduler=run.scheduler, steps=run.steps, denoise=1.0)
        plain = replace(run.uncorrected, sampler="heun")
        return self._by_sigmas(model, plain, labels, latent, seed, split_but_last(sigmas, SPLIT))

    def _by_sigmas(self, model, run, labels, latent, seed, sigmas):
        """Return the same from the host's SamplerCustom and IEC Sampler, over the given sigmas."""
        sampler, reports = self.run(
            "IECSampler", sampler=self.run("KSamplerSelect", sampler_name=run.sampler)[0], **self._correction(run)
        )
        latent, _ = self.run(
            "SamplerCustom", model=model, add_noise=True, noise_seed=seed, cfg=run.cfg, **labels, sampler=sampler,
            sigmas=sigmas, latent_image=latent,
        )  # fmt: skip
        return latent, reports[-1].nfe

    def at_once(self, architecture):
        """Return how many images of a model the GPU samples at once, a power of two from 8 to 256.

        The memory that the host expects them to take must fit into half of the free memory.
        """
        import comfy.model_management as management

        device, size = management.get_torch_device(), MOST_AT_ONCE
        (model,) = self.run("IECLoadBuiltinModel", precision="float32", architecture=architecture)
        while size > CHUNK and model.model.memory_required([2 * size, 3, 32, 32]) > management.get_free_memory(device) / 2:
            size //= 2
        return size


@functools.cache
def _classifier():
    return classifier.load()[0]


def quadratic_sigmas(sampling, steps):
    """Return float32 [steps + 1], from the most noise to 0, on the timesteps of the authors' DDIM.

    They are linspace(0, sqrt(0.8 T), steps)^2; T = 1000 in both implementations. The authors' code cuts off the fractions, so
    that a few of its steps do not move.
    """
    timesteps = torch.linspace(0, (0.8 * len(sampling.sigmas)) ** 0.5, steps) ** 2
    return torch.cat([sampling.sigma(timesteps).flip(0).float(), torch.zeros(1)])


def split_but_last(sigmas, parts):
    """Return float32 sigmas in which every step but the last one is split into `parts` steps of the same width."""
    here, then = sigmas[:-2, None], sigmas[1:-1, None]
    return torch.cat([(here + (then - here) * torch.arange(parts) / parts).flatten(), sigmas[-2:]])


def pixels(latents):
    """Return the images in 0..1 of latents [N, 3, 32, 32] of the built-in models, whose latents are images in -1..1."""
    return (latents.clamp(-1, 1) + 1) / 2


def features(latents):
    """Return {network: features float32 [N, 64]} of latents [N, 3, 32, 32]."""
    images = pixels(latents)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    return {"emoji": _classifier().features(images).float(), "imagenet": imagenet.real().of(images, on).float()}


def device():
    """Return the name of the device that the host computes on: a GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


class Store:
    """A folder of sampled chunks. A file that cannot be read completely counts as missing."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)

    def path(self, chunk):
        """Return a chunk's file; it differs for weights that were trained twice from the same recipe."""
        told = digest(chunk.run)
        if chunk.run.weights != Run.weights and train_smooth.is_there(chunk.run.weights):
            told += "-" + sha256(train_smooth.path(chunk.run.weights))[:8]
        return self.folder / f"{told}-{chunk.size}x{chunk.number}.safetensors"

    def load(self, chunk):
        """Return ({"latents": [size, 3, 32, 32], "emoji": [size, 64], "imagenet": [size, 64]}, {"key", "nfe", "seconds",
        "device"}), or None if the chunk is missing.
        """
        try:
            with safetensors.safe_open(self.path(chunk), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("latents", "emoji", "imagenet")}
                about = json.loads(file.metadata()["about"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
            return None
        latents = tensors["latents"]
        is_whole = latents.shape == shape(chunk) and bool(latents.isfinite().all()) and about.get("key") == chunk.run.key
        return (tensors, about) if is_whole else None

    def save(self, chunk, content):
        """Write a chunk in one move; content: the result of `content_of` or `made`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            file.write(content)
        pathlib.Path(file.name).replace(self.path(chunk))

    def load_run(self, row, run):
        """Return ({"latents", "emoji", "imagenet"} of all images, evaluations of the network per image, each chunk's seconds,
        device) of one of a row's runs, or None if a chunk is missing.
        """
        chunks = [self.load(chunk) for chunk in row.chunks_of(run)]
        if any(chunk is None for chunk in chunks):
            return None
        about = [about for _, about in chunks]
        tensors = {name: torch.cat([tensors[name] for tensors, _ in chunks]) for name in chunks[0][0]}
        return tensors, about[0]["nfe"], [one["seconds"] for one in about], about[0]["device"]


def content_of(chunk, latents, nfe, seconds):
    """Return the bytes of a chunk's file."""
    about = {"key": chunk.run.key, "nfe": nfe, "seconds": seconds, "device": device()}
    return save({"latents": latents, **features(latents)}, {"about": json.dumps(about)})


_ready = {}  # the Sampler of a process, once it is prepared


def prepare():
    """Prepare this process for `made`: one thread, ComfyUI loaded. Return its Sampler."""
    if not _ready:
        torch.set_num_threads(1)
        _ready["sampler"] = Sampler(comfyui.load_nodes(*STOCK, cpu=not torch.cuda.is_available()))
    return _ready["sampler"]


def made(chunk):
    """Sample a chunk, and return the bytes of its file."""
    with torch.inference_mode():
        return content_of(chunk, *prepare().chunk(chunk))


def at_once():
    """Return how many images of either model this machine samples at once: 8 without a GPU."""
    return min(map(prepare().at_once, WEIGHTS)) if torch.cuda.is_available() else CHUNK


def prepare_child():
    """Ignore a terminal's interrupt of the process group, so that the current chunk is not lost, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.end_with_parent()
    prepare()


def _sample(chunk, folder):
    """Sample a chunk into a store's folder."""
    Store(folder).save(chunk, made(chunk))


def sampled(chunks, store, workers):
    """Sample Chunks into a store; yield each chunk when it is there.

    The work is done by this many processes, or by the workers of the Ray cluster that RAY_ADDRESS names. Raises the errors of
    `Sampler.chunk`. On an interrupt, its own processes finish their current chunks.
    """
    if experiment_ray.is_wanted():
        yield from experiment_ray.sampled(chunks, store)
        return
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, prepare_child)
    try:
        futures = {executor.submit(_sample, chunk, store.folder): chunk for chunk in chunks}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        executor.shutdown(cancel_futures=True)


def errors(latents, reference):
    """Return the relative error of each image as numpy float64 [N]; latents and reference [N, 3, 32, 32]."""
    return pack.load("iec_core.metrics").relative_error(latents, reference).numpy()
