"""Fine-tune two networks from the built-in U-Net, to test whether one with a smaller Jacobian needs less correction.

    python tools/train_smooth.py

Both are trained from the built-in weights for equally long, about half an hour of one CPU core each: `smooth` with a penalty on
||J u|| / ||u||, J the derivative of the predicted noise by the noised image, u a random direction; `longer` without the
penalty. The rows of docs/results/smoothness.csv and smoothness_norms.csv compare them. The files are kept in .cache/smoothness,
named by the digest of their recipe. The command can be stopped, and continues from the last snapshot: less than ten minutes are
lost.
"""

import hashlib
import json
import multiprocessing
import signal
import sys

import comfyui
import emoji
import processes
import torch
import train_builtin_model
import training

BUILTIN = training.BUILTIN / "emoji32.safetensors"
# Half the rate of the earlier trainings. `longer` and `smooth` take equally long: a step of `smooth` takes 1.67 times as long
# as one of `longer`.
SETTINGS = train_builtin_model.SETTINGS | {"seed": 20261129, "learning_rate": 3e-4, "warmup_steps": 100}
STEPS = {"longer": 2100, "smooth": 1260}
# In trials of 150 steps with penalty weights of 0.02, 0.1 and 0.3: 0.02 changed little, and 0.3 doubled the loss.
PENALTY = {"weight": 0.1, "images": 8, "difference": 0.01}


def recipe(weights):
    """Return the recipe of the weights "longer" or "smooth", as JSON has it."""
    made_of = SETTINGS | {"steps": STEPS[weights], "start": training.sha256(BUILTIN), "data": emoji.DATA_PACKAGE}
    return made_of | ({"penalty": PENALTY} if weights == "smooth" else {})


def path(weights):
    """Return the path of the weights "longer" or "smooth"; another recipe gives another path."""
    told = hashlib.sha256(json.dumps(recipe(weights)).encode()).hexdigest()[:8]
    return comfyui.CACHE / "smoothness" / f"{weights}-{told}.safetensors"


def is_there(weights):
    """Return whether the weights "longer" or "smooth" are there, completely trained by the one run of the recipe."""
    before, history = training.history(BUILTIN), training.history(path(weights))
    return len(history) == len(before) + 1 and history[-1]["step"] == STEPS[weights]


def penalty(unet, task):
    """Return the mean over a small batch of ||J u|| / ||u||, scalar float32.

    J is the derivative of the predicted noise by alpha * (x0 + sigma * noise), u a random direction. This measures the effect
    of a random change on average; a norm of J would measure the worst change. It is computed by finite differences in float32,
    because bfloat16 is too coarse for them.
    """
    noised, beside, alpha, sigma, _ = task.draw(PENALTY["images"])
    direction = torch.randn(noised.shape, generator=task.generator, dtype=noised.dtype)
    beside = {name: torch.cat([tensor, tensor]) for name, tensor in beside.items()}
    both = torch.cat([noised, noised + PENALTY["difference"] * direction]).contiguous(memory_format=torch.channels_last)
    v, moved_v = unet(both, **beside).chunk(2)
    change = alpha * (moved_v - v) / PENALTY["difference"] + alpha * sigma * direction  # of eps = alpha (v + sigma x)
    return (change.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1)).mean()


def train(weights):
    """Train "longer" or "smooth", or continue a stopped training; in its own process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a traceback
    processes.end_with_parent()
    torch.set_num_threads(1)
    comfyui.import_comfy(cpu=True, use_pytorch_cross_attention=True)
    images, labels = emoji.fetch_images(comfyui.CACHE / "emoji")
    file = path(weights)
    file.unlink(missing_ok=True)  # the state is what it continues from; without a state it restarts, as the recipe says

    def loss_of(unet, generator):
        task = train_builtin_model.Task(images, labels, generator)
        if weights == "longer":
            return lambda: train_builtin_model.v_loss(unet, task)
        return lambda: train_builtin_model.v_loss(unet, task) + PENALTY["weight"] * penalty(unet, task)

    training.run_on(
        file, BUILTIN, train_builtin_model.build_unet, train_builtin_model.UNET_CONFIG, list(emoji.CLASSES),
        f"ComfyUI-IEC built-in emoji model, {weights}", loss_of, recipe(weights), emoji.facts(images, labels),
    )  # fmt: skip


def main():
    emoji.fetch_images(comfyui.CACHE / "emoji")  # in one process, before the others start
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=train, args=(weights,)) for weights in STEPS if not is_there(weights)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return any(child.exitcode for child in children)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops like Ctrl+C
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Stopped; it goes on from the last snapshot.")
