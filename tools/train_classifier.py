"""Train the classifier whose features measure generated images (see `classifier.py`).

    python tools/train_classifier.py --out tools/assets/emoji_classifier.safetensors

It trains only on the training part of `emoji.split`, a few minutes on one CPU core. The file's metadata contain the data and
their digest, the settings, and the share of held-out images that the saved weights classify correctly. The last weights are
kept, never those that were best on the held-out images, so that this share is unbiased. The held-out images, with which
generated images are compared, are saved next to the file: measuring needs no download.
"""

import argparse
import copy
import math
import pathlib
import sys

import classifier
import comfyui
import emoji
import torch
import training

SETTINGS = {
    "seed": 20261124,
    "steps": 3000,
    "batch_size": 64,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "weight_decay": 0.05,
    "gradient_clip": 1.0,
    "ema_decay": 0.995,
    "label_smoothing": 0.1,
    "dropout": 0.2,
    "shift": 3,  # pixels at most, in each direction
    "hue": 0.15,  # radians at most, in each direction
    "saturation": 0.4,  # relative, at most, in each direction
    "contrast": 0.2,  # likewise, about white
}


def shift(x, most, generator):
    """Return images [B, 3, H, W], each moved by its own -most..most whole pixels in both directions; white fills the border."""
    batch, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (most,) * 4, value=1.0)
    by = torch.randint(2 * most + 1, (2, batch, 1, 1), generator=generator)
    rows = by[0] + torch.arange(height).view(1, -1, 1)
    columns = by[1] + torch.arange(width).view(1, 1, -1)
    return padded.permute(0, 2, 3, 1)[torch.arange(batch).view(-1, 1, 1), rows, columns].permute(0, 3, 1, 2)


def jitter(x, settings, generator):
    """Return images [B, 3, H, W] in -1..1 with hue, saturation and contrast changed randomly for each image.

    White, the background of all emoji, stays white: hue turns about the grey axis, contrast scales the distance from white.
    """
    draw = torch.rand(3, len(x), 1, 1, generator=generator) * 2 - 1
    angle, saturation = draw[0] * settings["hue"], 1 + draw[1] * settings["saturation"]
    contrast = 1 + draw[2] * settings["contrast"]
    grey = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    # Rodrigues' rotation about (1, 1, 1), with its part perpendicular to the axis scaled.
    turn = grey + saturation * (torch.cos(angle) * (torch.eye(3) - grey) + torch.sin(angle) * cross)
    ink = torch.einsum("bij,bjhw->bihw", turn * contrast, 1 - x)
    return (1 - ink).clamp(-1, 1)


def classification_loss(network, batches, settings, generator):
    """Return a function that draws a batch and returns its cross-entropy, scalar float32."""

    def loss():
        x, one_hot = batches.draw(settings["batch_size"])
        x = jitter(shift(x, settings["shift"], generator), settings, generator)
        return torch.nn.functional.cross_entropy(network(x), one_hot, label_smoothing=settings["label_smoothing"])

    return loss


def accuracy(network, images, labels):
    """Return the share of images (uint8 [N, 32, 32, 3]) that a network in eval mode classifies as their label (int64 [N])."""
    return (network.classify(torch.from_numpy(images).permute(0, 3, 1, 2)) == torch.from_numpy(labels)).double().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=classifier.WEIGHTS)
    args = parser.parse_args()

    (images, labels), held_out = emoji.split(*emoji.fetch_images(comfyui.CACHE / "emoji"))
    facts = dict(SETTINGS, torch=torch.__version__, **emoji.facts(images, labels), held_out_images=len(held_out[0]))
    print(f"{len(images)} images in {len(emoji.CLASSES)} classes", flush=True)
    torch.manual_seed(SETTINGS["seed"])
    generator = torch.Generator().manual_seed(SETTINGS["seed"])

    classifier.save_real_images(args.out.with_name(classifier.REAL_IMAGES.name), *held_out)

    def snapshot(average, step, loss):
        saved = copy.deepcopy(average).half().float()  # the weights with the precision of the file
        share = {"accuracy": accuracy(saved, images, labels), "held_out_accuracy": accuracy(saved, *held_out)}
        print({name: round(value, 4) for name, value in share.items()}, flush=True)
        told = dict(facts, step=step, loss=round(loss, 5), **share)
        training.save(average, args.out, "ComfyUI-IEC emoji classifier", classes=list(emoji.CLASSES), training=told)

    network = classifier.Classifier(len(emoji.CLASSES), SETTINGS["dropout"])
    batches = emoji.Batches(images, labels, generator, label_dropout=0.0)
    training.train(network, classification_loss(network, batches, SETTINGS, generator), SETTINGS, snapshot)


if __name__ == "__main__":
    sys.exit(main())
