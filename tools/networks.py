"""Networks of true shapes with random weights, for timing."""

import benchmark
import torch

SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": -1, "num_head_channels": 64,
    "use_spatial_transformer": True, "context_dim": 2048, "use_linear_in_transformer": True, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip

FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
FLUX_SMALL = {**FLUX, "depth": 1, "depth_single_blocks": 2}  # without a GPU

Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_layers": 30,
    "n_refiner_layers": 2, "qk_norm": True, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
    "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256, "text_dim": 4096,
    "num_heads": 12, "num_layers": 30, "in_dim": 16, "out_dim": 16,
}  # fmt: skip

# All blocks of a network, but so narrow that on one core of a CPU an evaluation of a small latent takes about a second.
NARROW = {
    "SDXL": {**SDXL, "model_channels": 64, "context_dim": 410},
    "Flux": {**FLUX, "hidden_size": 384, "num_heads": 3},
    "Z-Image": {**Z_IMAGE, "dim": 384, "n_heads": 3, "n_kv_heads": 3},
    "Wan 2.1": {**WAN, "dim": 384, "ffn_dim": 2240, "num_heads": 3},
}

# The settings that count a network's blocks, if it has b at each end.
SHORT = {
    "Flux": lambda b: {"depth": b, "depth_single_blocks": b},
    "Z-Image": lambda b: {"n_layers": 2 * b},
    "Wan 2.1": lambda b: {"num_layers": 2 * b},
}

TINY = {**benchmark.SD15, "model_channels": 32, "num_heads": 4}  # to check that something runs

# The names of the Linear layers in the blocks.
LINEAR = {kind: "*.attn1.* *.attn2.* *.ff.net.*" for kind in ("SD 1.5", "SDXL", "tiny U-Net")} | {"Flux": "*"}


def _shape(kind, on_gpu):
    """Return (network's config, host's config class, host's model class, key of the context's width, pooled output's width)."""
    import comfy.model_base
    import comfy.supported_models as known

    return {
        "SD 1.5": (benchmark.SD15, known.SD15, comfy.model_base.BaseModel, "context_dim", 768),
        "tiny U-Net": (TINY, known.SD15, comfy.model_base.BaseModel, "context_dim", 768),
        "SDXL": (SDXL, known.SDXL, comfy.model_base.SDXL, "context_dim", 1280),
        "Flux": (FLUX if on_gpu else FLUX_SMALL, known.Flux, comfy.model_base.Flux, "context_in_dim", 768),
        "Z-Image": (Z_IMAGE, known.ZImage, comfy.model_base.Lumina2, "cap_feat_dim", 768),
        "Wan 2.1": (WAN, known.WAN21_T2V, comfy.model_base.WAN21, "text_dim", 768),
    }[kind]


def _newer(kind):
    """Return the additional settings that newer hosts need for a network."""
    import comfy.ldm.flux.model

    wanted = kind == "Flux" and "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    return {"txt_ids_dims": []} if wanted else {}


def random_model(kind, float8=False, narrow=False, ends=None):
    """Return (MODEL, CONDITIONING) of the shape of "SD 1.5", "SDXL", "Flux", "Z-Image", "Wan 2.1" (of 1.3 billion weights) or a
    "tiny U-Net", with random weights.

    The dtype is float32 on a CPU, else float16, and bfloat16 for transformers. float8: Linear layers in the host's float8 e4m3,
    computed in float8. narrow: the width is that of NARROW. Otherwise, without a GPU, Flux has three of its 57 blocks. ends:
    the network has only so many blocks at each end.
    """
    import comfy.model_management
    import comfy.model_patcher

    at = benchmark.device()[0]
    on_gpu = at.type == "cuda"
    network, config, build, context, pooled = _shape(kind, on_gpu)
    network = {**(NARROW[kind] if narrow else network), **_newer(kind), **(SHORT[kind](ends) if ends else {})}
    config = config(network)
    dtype = (torch.float16 if "model_channels" in network else torch.bfloat16) if on_gpu else torch.float32
    config.set_inference_dtype(torch.float8_e4m3fn if float8 else dtype, dtype if float8 else None)
    config.optimizations["fp8"] = float8
    model = build(config, device=at)
    for parameter in model.parameters():  # the layers are created without values
        parameter.data.copy_(torch.randn(parameter.shape, device=at, dtype=dtype) * 0.02)
    patcher = comfy.model_patcher.ModelPatcher(model, at, comfy.model_management.unet_offload_device())
    return patcher, [[torch.randn(1, 77, network[context]), {"pooled_output": torch.randn(1, pooled)}]]
