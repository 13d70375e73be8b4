"""Train the second built-in model: a small class-conditional flow-matching transformer on Noto emoji, in pixel space.

    python tools/train_transformer.py

The network is the host's own `Flux` class, 4 x 4 pixels per token. It predicts the flow's velocity, noise - image, at noise
levels drawn as in Stable Diffusion 3 (arXiv 2403.03206: logit-normal). Every tenth image of each class is held out. It is
trained further run by run, like `train_builtin_model.py`.
"""

import copy
import sys

import comfyui
import emoji
import torch
import training

TRANSFORMER_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "vec_in_dim": len(emoji.CLASSES),
    "context_in_dim": len(emoji.CLASSES),
    "hidden_size": 192,
    "mlp_ratio": 4.0,
    "num_heads": 6,
    "depth": 2,
    "depth_single_blocks": 6,
    "axes_dim": [8, 12, 12],
    "theta": 1000,
    "patch_size": 4,
    "qkv_bias": True,
    "guidance_embed": False,
}

SETTINGS = {
    "seed": 20261124,
    "steps": 4000,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup_steps": 200,
    "weight_decay": 0.01,
    "gradient_clip": 1.0,
    "label_dropout": 0.1,
    "ema_decay": 0.998,
    "prediction": "flow",
    "precision": "bf16 autocast",
}


def build_transformer():
    """Return the host's Flux network in float32 with fresh weights (the host's own layers skip their initialisation)."""
    import comfy.ops
    from comfy.ldm.flux.layers import LastLayer, Modulation, RMSNorm
    from comfy.ldm.flux.model import Flux

    network = Flux(**copy.deepcopy(TRANSFORMER_CONFIG), dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            for scale in module.parameters():
                torch.nn.init.ones_(scale)
    # As in DiT (arXiv 2212.09748): gates and output start at zero, so that the network begins as its skip path.
    ends = [m.lin for m in network.modules() if isinstance(m, Modulation)]
    ends += [layer for m in network.modules() if isinstance(m, LastLayer) for layer in (m.linear, m.adaLN_modulation[-1])]
    for layer in ends:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return network


def velocity_loss(network, batches, generator):
    """Return a function that draws a batch and returns the mean squared error of the velocity, scalar float32."""

    def loss():
        x0, label = batches.draw(SETTINGS["batch_size"])
        sigma = torch.sigmoid(torch.randn(len(x0), generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        at = sigma.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = network((1 - at) * x0 + at * noise, sigma, context=label[:, None], y=label)
        return torch.nn.functional.mse_loss(velocity.float(), noise - x0)

    return loss


def main():
    args = training.arguments("emoji32_flow.safetensors", __doc__.splitlines()[0])
    start = None if args.anew else training.BUILTIN / "emoji32_flow.safetensors"

    comfyui.import_comfy(cpu=True, use_pytorch_cross_attention=True)
    (images, labels), held_out = emoji.split(*emoji.fetch_images(comfyui.CACHE / "emoji"))
    print(f"{len(images)} images in {len(emoji.CLASSES)} classes, {len(held_out[1])} held out", flush=True)

    def loss_of(network, generator):
        return velocity_loss(network, emoji.Batches(images, labels, generator, SETTINGS["label_dropout"]), generator)

    title, data = "ComfyUI-IEC built-in emoji flow transformer", dict(emoji.facts(images, labels), held_out=len(held_out[1]))
    classes = list(emoji.CLASSES)
    training.run_on(args.out, start, build_transformer, TRANSFORMER_CONFIG, classes, title, loss_of, SETTINGS, data)


if __name__ == "__main__":
    sys.exit(main())
