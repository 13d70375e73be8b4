"""Common parts of the trainings of this pack's models: the loop, the averaged weights, the file, and the continuation."""

import argparse
import copy
import functools
import hashlib
import json
import math
import pathlib
import time

import comfyui
import pack
import torch

BUILTIN, TRAINING = comfyui.ROOT / "nodes/assets", comfyui.ROOT / "tools/assets/training"
SNAPSHOT = 500  # steps between two snapshots; for the built-in models, less than ten minutes on one CPU core


@functools.cache
def sha256(path):
    """Return the hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def learning_rate_factor(step, settings):
    """Return the factor on the base rate: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / settings["warmup_steps"])
    return warmup * 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))


def train(network, loss_of_a_batch, settings, on_snapshot, state=None):
    """Minimise `loss_of_a_batch()`.

    Every 500 steps and at the end, on_snapshot(averaged network, steps done, mean loss of the last 500 steps) is called.
    settings: steps, learning_rate, warmup_steps, weight_decay, gradient_clip, ema_decay. state: a `State`, from which an
    interrupted training continues, to the same weights bit for bit.
    """
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=settings["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    parts = {"network": network, "average": average, "optimizer": optimizer, "schedule": schedule}
    first = state.restore(parts) if state else 0
    losses, began = [], time.time()
    for step in range(first, settings["steps"]):
        with pack.load("iec_core.autograd").saved_apart():
            loss = loss_of_a_batch()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings["gradient_clip"])
        optimizer.step()
        schedule.step()
        decay = min(settings["ema_decay"], (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
        losses.append(loss.item())
        is_last = step + 1 == settings["steps"]
        if (step + 1) % SNAPSHOT == 0 or is_last:
            recent = sum(losses[-SNAPSHOT:]) / len(losses[-SNAPSHOT:])
            print(f"{state.name if state else ''}  step {step + 1}  loss {recent:.4f}  {time.time() - began:.0f} s", flush=True)
            if state and not is_last:
                state.save(step + 1, parts)
            on_snapshot(average, step + 1, recent)
    if state:
        state.remove()


class State:
    """Everything that an interrupted training continues from, in a file that is replaced in one move."""

    def __init__(self, path, run, generator):
        """Keep the path. run: the facts of the training run, as JSON has them; a file of another run is ignored. generator: the
        torch.Generator that draws the batches.
        """
        self._path, self._run, self._generator = pathlib.Path(path), run, generator
        self.name = self._path.stem

    def _kept(self):
        if not self._path.exists():
            return None
        kept = torch.load(self._path, weights_only=True)
        return kept if json.loads(kept["run"]) == self._run else None

    def is_there(self):
        """Return whether there is a state to continue from."""
        return self._kept() is not None

    def restore(self, parts):
        """Load the state into parts, {name: object with a state_dict}, and return how many steps are done; 0 without a file."""
        kept = self._kept()
        if kept is None:
            return 0
        for name, part in parts.items():
            part.load_state_dict(kept[name])
        self._generator.set_state(kept["generator"])
        print(f"goes on after step {kept['step']}", flush=True)
        return kept["step"]

    def save(self, step, parts):
        """Write the file; step: the number of steps done."""
        kept = {name: part.state_dict() for name, part in parts.items()}
        kept |= {"run": json.dumps(self._run), "step": step, "generator": self._generator.get_state()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        torch.save(kept, partial)
        partial.replace(self._path)

    def remove(self):
        self._path.unlink(missing_ok=True)


def arguments(name, about):
    """Return the arguments of a built-in model's training, --out and --anew. name: of its file; about: the command's help."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=pathlib.Path, default=TRAINING / name, metavar="FILE")
    parser.add_argument(
        "--anew", action="store_true", help="without such a file, start from fresh weights, not from the built-in ones"
    )
    return parser.parse_args()


def run_on(path, start, build, config, classes, title, loss_of, settings, data):
    """Train a model further by one run of settings["steps"] steps, from the weights in its file.

    path: the safetensors file; an interrupted run continues from its last snapshot if .cache/training has its state. start: the
    file to begin with if `path` does not exist, None for fresh weights. build(): the network with fresh weights.
    loss_of(network, generator): the `loss_of_a_batch` of `train`. settings: as in `train`, and "seed", to which the number of
    earlier runs is added. data: facts of the images. The file's metadata list all runs, the first one first: settings, data,
    steps done, loss.
    """
    weights, runs = read(path if path.exists() else start)
    was_stopped = bool(runs) and runs[-1]["step"] < runs[-1]["steps"]
    for earlier in (runs[:-1], runs) if was_stopped else (runs,):
        run = dict(settings, seed=settings["seed"] + len(earlier), torch=torch.__version__, **data)
        generator = torch.Generator().manual_seed(run["seed"])
        state = State(state_path(path), run, generator)
        if state.is_there():
            break
    torch.manual_seed(run["seed"])
    network = build()
    if weights:
        network.load_state_dict(weights)

    def snapshot(average, step, loss):
        runs = [*earlier, dict(run, step=step, loss=round(loss, 5))]
        save(average, path, title, unet_config=config, classes=classes, training=runs)

    print(f"run {len(earlier) + 1} of {path.name}, {settings['steps']} steps", flush=True)
    train(network, loss_of(network, generator), settings, snapshot, state)


def state_path(path):
    """Return the path of the state of a file's interrupted training; it is different for every file."""
    told = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    return comfyui.CACHE / "training" / f"{path.stem}-{told}.pt"


def history(path):
    """Return the list of training runs from a model file's metadata; [] if there is none."""
    import safetensors

    if path is None or not path.exists():
        return []
    with safetensors.safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["iec.training"])
    return told if isinstance(told, list) else [told]  # files of a single run have it without a list


def read(path):
    """Return (weights in float32, the list of training runs) of a model's file; (None, []) if there is none."""
    from safetensors.torch import load_file

    if path is None or not path.exists():
        return None, []
    return {name: tensor.float() for name, tensor in load_file(path).items()}, history(path)


def save(network, path, title, **facts):
    """Write fp16 weights and metadata to `path`, through a temporary file so that a crash leaves no incomplete file.

    facts: metadata, each stored as JSON under "iec." and its name.
    """
    from safetensors.torch import save_file

    weights = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {
        "format": "pt",
        "modelspec.title": title,
        "modelspec.license": "Weights: GPL-3.0-or-later. Training images: Noto Emoji, Apache-2.0.",
        **{"iec." + name: json.dumps(value) for name, value in facts.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata)
    partial.replace(path)
