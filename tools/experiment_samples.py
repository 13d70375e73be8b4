"""Images of the runs of experiments: sampled by the pack's own nodes, a chunk at a time, and kept as files.

A chunk is `CHUNK` images, less than a minute's work on one core. Its noise comes from the chunk's number alone, so that an
image is the same whoever samples it and whatever was sampled before. `sampled` has chunks made by processes of their own:
`prepare` makes one ready, `sample` works in it.
"""

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import pathlib
import signal
import tempfile
import time
from dataclasses import asdict

import comfyui
import emoji
import experiment_rows
import pack
import processes
import safetensors
import torch
from safetensors.torch import save

CHUNK = 8
SEED = 1000  # of the first chunk's noise; the next one's is one more
ASSETS = comfyui.ROOT / "nodes/assets"
WEIGHTS = {"unet": ASSETS / "emoji32.safetensors", "transformer": ASSETS / "emoji32_flow.safetensors"}
SHAPE = (CHUNK, 3, 32, 32)


@functools.cache
def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(thing):
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:12]


def digest(run):
    """Return what tells a run's images from others, 12 hexadecimal digits: its settings, the seeds, the model's weights."""
    return _digest([asdict(run), CHUNK, SEED, _sha256(WEIGHTS[run.architecture])])


def row_digest(run):
    """Return what tells a run's row from others: its images, how many they are, and all that they are measured against."""
    return _digest([experiment_rows.IMAGES, *map(digest, (run, run.baseline, *run.references.values()))])


class Sampler:
    """Samples runs through the nodes of a ComfyUI that is loaded into this process."""

    def __init__(self, known):
        self._known, self._models = known, {}

    def _run(self, node, **inputs):
        return self._known[node].execute(**inputs).result

    def _model(self, run):
        """Return the MODEL of a run, each made once."""
        key = run.architecture, run.quantization, run.interval, run.forecast
        if key not in self._models:
            (model,) = self._run("IECLoadBuiltinModel", precision="float32", architecture=run.architecture)
            if run.quantization != "none":
                weights, activations = run.quantization.removeprefix("W").split("A")
                bits = {"weight_bits": weights, "activation_bits": activations}
                (model,) = self._run("IECQuantizeModel", model=model, keep_sensitive_layers=True, **bits)
            if run.interval > 1:
                (model,) = self._run("IECDeepCache", model=model, interval=run.interval, branch=0, forecast=run.forecast)
            self._models[key] = model
        return self._models[key]

    def chunk(self, run, number):
        """Return (latents float32 [CHUNK, 3, 32, 32], evaluations of the network, seconds). Raises ValueError where a latent
        is not finite.
        """
        classes = list(emoji.CLASSES)
        labels = ", ".join(classes[(number * CHUNK + place) % len(classes)] for place in range(CHUNK))
        inputs = {
            "positive": self._run("IECClassLabel", labels=labels)[0], "negative": self._run("IECClassLabel", labels="none")[0],
            "latent_image": {"samples": torch.zeros(SHAPE)}, "denoise": 1.0, "seed": SEED + number, "steps": run.steps,
            "cfg": run.cfg, "sampler_name": run.sampler, "scheduler": run.scheduler,
            "correction_steps": run.correction_steps, "evaluation_point": run.evaluation_point, "lambda_": run.lambda_,
            "max_iterations": run.max_iterations, "tolerance": 0.0,
        }  # fmt: skip
        model, begin = self._model(run), time.perf_counter()
        latent, reports = self._run("IECKSampler", model=model, **inputs)
        if not bool(latent["samples"].isfinite().all()):
            raise ValueError(f"{run.key}: a latent of images {number * CHUNK} to {number * CHUNK + CHUNK - 1} is not finite.")
        return latent["samples"].float().cpu(), reports[0].nfe, time.perf_counter() - begin


def device():
    """Return what the host computes on: a GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


class Store:
    """A folder of sampled chunks. What cannot be read back whole counts as not there."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)

    def path(self, run, number):
        return self.folder / f"{digest(run)}-{number}.safetensors"

    def load(self, run, number):
        """Return (latents [CHUNK, 3, 32, 32], {"key", "nfe", "seconds", "device"}), or None where there is no such chunk."""
        try:
            with safetensors.safe_open(self.path(run, number), "pt") as file:
                latents, about = file.get_tensor("latents"), json.loads(file.metadata()["about"])
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError):
            return None
        is_whole = latents.shape == SHAPE and bool(latents.isfinite().all()) and about.get("key") == run.key
        return (latents, about) if is_whole else None

    def save(self, run, number, latents, nfe, seconds):
        """Write a chunk, in one move."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"key": run.key, "nfe": nfe, "seconds": seconds, "device": device()}
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".partial", delete=False) as file:
            file.write(save({"latents": latents}, {"about": json.dumps(about)}))
        pathlib.Path(file.name).replace(self.path(run, number))

    def load_run(self, run):
        """Return (latents [IMAGES, 3, 32, 32], evaluations of the network for an image, seconds in all, device), or None
        where a chunk is missing.
        """
        chunks = [self.load(run, number) for number in range(experiment_rows.IMAGES // CHUNK)]
        if any(chunk is None for chunk in chunks):
            return None
        about = [about for _, about in chunks]
        latents = torch.cat([latents for latents, _ in chunks])
        return latents, about[0]["nfe"], sum(one["seconds"] for one in about), about[0]["device"]


_ready = {}  # the Sampler of a process, once it is prepared


def prepare():
    """Make this process ready for `sample`: one thread, ComfyUI loaded. It goes on where a terminal interrupts the whole group,
    so that the chunk at hand is not lost, and ends with its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes.end_with_parent()
    torch.set_num_threads(1)
    _ready["sampler"] = Sampler(comfyui.load_nodes(cpu=not torch.cuda.is_available()))


def sample(run, number, folder):
    """Sample a chunk of a run into a store's folder."""
    with torch.inference_mode():
        Store(folder).save(run, number, *_ready["sampler"].chunk(run, number))


def sampled(chunks, store, workers):
    """Sample chunks, (Run, number), into a store by as many processes; yield each when it is there.

    Raises what `Sampler.chunk` does. Where it is interrupted, the chunks at hand are finished.
    """
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor(workers, context, prepare)
    try:
        futures = {executor.submit(sample, *chunk, store.folder): chunk for chunk in chunks}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        executor.shutdown(cancel_futures=True)


def errors(latents, reference):
    """Return the relative error of each image as numpy float64 [N]; latents and reference [N, 3, 32, 32]."""
    return pack.load("iec_core.metrics").relative_error(latents, reference).numpy()
