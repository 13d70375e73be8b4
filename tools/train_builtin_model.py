"""Train the built-in model: a small class-conditional pixel-space diffusion model on Noto emoji.

    python tools/train_builtin_model.py

One call trains the weights in tools/assets/training further by one run, about an hour on one CPU core. If there are no weights
there, it starts from the built-in ones. A stopped run continues. The network is the host's own `UNetModel` (the class behind SD
1.5 and SDXL), so that the pack quantizes and caches the same layers in the built-in model as in users' models. It predicts v on
the host's default discrete schedule. The metadata of the safetensors file contain everything that a loader needs (U-Net config,
class names) and everything that a reader may ask (data package and its digest, and of every run: seed, settings, loss).

Data: all images of `emoji.py`.
"""

import copy
import sys

import comfyui
import emoji
import torch
import training

UNET_CONFIG = {
    "image_size": emoji.IMAGE_SIZE,
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
    "context_dim": len(emoji.CLASSES),
    "num_classes": "sequential",
    "adm_in_channels": len(emoji.CLASSES),
    "legacy": False,
}

SETTINGS = {
    "seed": 20261123,
    "steps": 2800,
    "batch_size": 32,
    "learning_rate": 6e-4,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "label_dropout": 0.1,
    "ema_decay": 0.998,
    "prediction": "v",
    "precision": "bf16 autocast",
}


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
    return unet.to(memory_format=torch.channels_last)


class Task:
    """Random batches of images with noise at random timesteps of the host's default discrete schedule, and their v."""

    def __init__(self, images, labels, generator):
        """Set up the batches. images, labels: as `emoji.fetch_images` returns them. generator: torch.Generator of all random
        draws.
        """
        import comfy.model_sampling

        self.generator = generator
        self._batches = emoji.Batches(images, labels, generator, SETTINGS["label_dropout"])
        self._sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas

    def draw(self, size):
        """Return (alpha * (x0 + sigma * noise) [B, 3, 32, 32], the network's other inputs, alpha and sigma [B, 1, 1, 1], v like
        the images); alpha = 1 / sqrt(1 + sigma^2).
        """
        x0, label = self._batches.draw(size)
        timestep = torch.randint(len(self._sigmas), (size,), generator=self.generator)
        noise = torch.randn(x0.shape, generator=self.generator)
        sigma = self._sigmas[timestep].view(-1, 1, 1, 1)
        alpha = (1 + sigma**2).rsqrt()
        beside = {"timesteps": timestep, "context": label[:, None], "y": label}
        return alpha * (x0 + sigma * noise), beside, alpha, sigma, alpha * (noise - sigma * x0)


def v_loss(unet, task):
    """Return the mean squared error of v in a batch of a Task, scalar float32."""
    noised, beside, *_, target = task.draw(SETTINGS["batch_size"])
    with torch.autocast("cpu", torch.bfloat16):
        v = unet(noised.contiguous(memory_format=torch.channels_last), **beside)
    return torch.nn.functional.mse_loss(v.float(), target)


def main():
    args = training.arguments("emoji32.safetensors", __doc__.splitlines()[0])
    start = None if args.anew else training.BUILTIN / "emoji32.safetensors"

    comfyui.import_comfy(cpu=True, use_pytorch_cross_attention=True)
    images, labels = emoji.fetch_images(comfyui.CACHE / "emoji")
    print(f"{len(images)} images in {len(emoji.CLASSES)} classes", flush=True)

    def loss_of(unet, generator):
        task = Task(images, labels, generator)
        return lambda: v_loss(unet, task)

    title, data = "ComfyUI-IEC built-in emoji model", emoji.facts(images, labels)
    training.run_on(args.out, start, build_unet, UNET_CONFIG, list(emoji.CLASSES), title, loss_of, SETTINGS, data)


if __name__ == "__main__":
    sys.exit(main())
