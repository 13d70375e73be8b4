"""A small classifier of the emoji images, whose features measure how near generated images are to real ones.

It takes the place of Inception v3 in FID and KID. Inception v3 needs a download and was trained on photographs of 299 pixels.
Distances in these features are comparable with each other, not with published FIDs. `train_classifier.py` makes its file.
"""

import json

import comfyui
import emoji
import safetensors
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = comfyui.ROOT / "tools/assets/emoji_classifier.safetensors"
REAL_IMAGES = comfyui.ROOT / "tools/assets/emoji_held_out.safetensors"
CHANNELS = (32, 64, 96, 128)  # of the four stages, at 32, 16, 8 and 4 pixels
FEATURES = 64
GROUPS = 8  # of GroupNorm
BATCH = 256  # images per batch in `features`


class Classifier(torch.nn.Module):
    """Four stages of convolution, GroupNorm and SiLU, each but the last followed by halving the size; the mean over pixels; a
    layer of 64 features; the class scores.
    """

    def __init__(self, classes, dropout=0.0):
        super().__init__()
        stages, inputs = [], 3
        for outputs in CHANNELS:
            stages += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.GroupNorm(GROUPS, outputs), torch.nn.SiLU()]
            stages += [torch.nn.MaxPool2d(2)] if outputs != CHANNELS[-1] else []
            inputs = outputs
        self.stages = torch.nn.Sequential(*stages)
        self.embed = torch.nn.Linear(inputs, FEATURES)
        self.dropout = torch.nn.Dropout(dropout)
        self.score = torch.nn.Linear(FEATURES, classes)

    def penultimate(self, x):
        """Return the features float32 [N, 64] of x, float32 [N, 3, 32, 32] in -1..1."""
        return torch.nn.functional.silu(self.embed(self.stages(x).mean((2, 3))))

    def forward(self, x):
        """Return the class scores (logits) float32 [N, classes] of x, float32 [N, 3, 32, 32] in -1..1."""
        return self.score(self.dropout(self.penultimate(x)))

    @torch.no_grad()
    def features(self, images):
        """Return the features of images [N, 3, 32, 32] as float64 [N, 64] on the CPU.

        images: uint8 in 0..255 or floating point in 0..1. Raises ValueError for any other shape, type or value.
        """
        return torch.cat([self.penultimate(part).double() for part in parts(images)])

    @torch.no_grad()
    def classify(self, images):
        """Return the classes of images, int64 [N]; images as in `features`."""
        return torch.cat([self(part).argmax(1) for part in parts(images)])


def parts(images):
    """Yield batches of images for the network, float32 in -1..1; images as in `features`."""
    images = torch.as_tensor(images)
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32) or len(images) == 0:
        raise ValueError(f"images must be [N, 3, 32, 32] with N of 1 or more, not {list(images.shape)}.")
    if images.dtype == torch.uint8:
        x = images.float() / 255
    elif images.is_floating_point():
        x = images.float()
        if not (x.min() >= 0 and x.max() <= 1):  # written so that NaN is refused too
            raise ValueError("images of floating point must be within 0..1.")
    else:
        raise ValueError(f"images must be uint8 or floating point, not {images.dtype}.")
    return (x * 2 - 1).cpu().split(BATCH)


def load(path=WEIGHTS):
    """Return (the classifier in float32 and eval mode, the facts of its training) from its file."""
    with safetensors.safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        about = {name.removeprefix("iec."): json.loads(value) for name, value in file.metadata().items() if "iec." in name}
    classifier = Classifier(len(about["classes"]))
    classifier.load_state_dict(weights)
    return classifier.eval().requires_grad_(False), about


def save_real_images(path, images, labels):
    """Write held-out images, uint8 [N, 32, 32, 3], and their labels, int64 [N], with a description of their source."""
    metadata = {"license": "Noto Emoji, Apache-2.0", "facts": json.dumps(emoji.facts(images, labels))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"images": torch.from_numpy(images).contiguous(), "labels": torch.from_numpy(labels)}, path, metadata)


def real_images(path=REAL_IMAGES):
    """Return the held-out images, uint8 [N, 3, 32, 32] as `Classifier.features` takes them, and their labels, int64 [N]."""
    tensors = load_file(path)
    return tensors["images"].permute(0, 3, 1, 2), tensors["labels"]
