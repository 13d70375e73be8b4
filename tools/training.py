"""What the trainings of this pack's models have in common: the loop, the averaged weights, the file."""

import copy
import json
import math
import time

import pack
import torch


def learning_rate_factor(step, settings):
    """Return the factor on the base rate: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / settings["warmup_steps"])
    return warmup * 0.5 * (1 + math.cos(math.pi * step / settings["steps"]))


def train(network, loss_of_a_batch, settings, on_snapshot):
    """Minimise `loss_of_a_batch()`; every 500 steps and at the end call on_snapshot(averaged network, steps done, mean loss
    of the last 500 steps).

    settings: steps, learning_rate, warmup_steps, weight_decay, gradient_clip, ema_decay.
    """
    average = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.99), weight_decay=settings["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    losses, began = [], time.time()
    for step in range(settings["steps"]):
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
        if (step + 1) % 500 == 0 or step + 1 == settings["steps"]:
            recent = sum(losses[-500:]) / len(losses[-500:])
            print(f"step {step + 1}  loss {recent:.4f}  {time.time() - began:.0f} s", flush=True)
            on_snapshot(average, step + 1, recent)


def save(network, path, title, **facts):
    """Write fp16 weights and metadata to `path`, through a temporary file so that a crash leaves no half file.

    facts: what goes into the metadata as JSON, each under "iec." and its name.
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
