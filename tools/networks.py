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

TINY = {**benchmark.SD15, "model_channels": 32, "num_heads": 4}  # to check that something runs

# The names of the Linear layers in the blocks.
LINEAR = {kind: "*.attn1.* *.attn2.* *.ff.net.*" for kind in ("SD 1.5", "SDXL", "tiny U-Net")} | {"Flux": "*"}


def _shape(kind, on_gpu):
    """Return (network's config, host's config class, host's model class, context's width, pooled output's width)."""
    import comfy.model_base
    import comfy.supported_models as known

    return {
        "SD 1.5": (benchmark.SD15, known.SD15, comfy.model_base.BaseModel, 768, 768),
        "tiny U-Net": (TINY, known.SD15, comfy.model_base.BaseModel, 768, 768),
        "SDXL": (SDXL, known.SDXL, comfy.model_base.SDXL, 2048, 1280),
        "Flux": (FLUX if on_gpu else FLUX_SMALL, known.Flux, comfy.model_base.Flux, 4096, 768),
    }[kind]


def _newer(kind):
    """Return the additional settings that newer hosts need for a network."""
    import comfy.ldm.flux.model

    wanted = kind == "Flux" and "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    return {"txt_ids_dims": []} if wanted else {}


def random_model(kind, float8=False):
    """Return (MODEL, CONDITIONING) of the shape of "SD 1.5", "SDXL", "Flux" or a "tiny U-Net", with random weights.

    The dtype is float32 on a CPU, else float16, and bfloat16 for Flux. float8: Linear layers in the host's float8 e4m3,
    computed in float8. Without a GPU, Flux has three of its 57 blocks.
    """
    import comfy.model_management
    import comfy.model_patcher

    at = benchmark.device()[0]
    on_gpu = at.type == "cuda"
    network, config, build, context, pooled = _shape(kind, on_gpu)
    network = {**network, **_newer(kind)}
    config = config(network)
    dtype = (torch.bfloat16 if kind == "Flux" else torch.float16) if on_gpu else torch.float32
    config.set_inference_dtype(torch.float8_e4m3fn if float8 else dtype, dtype if float8 else None)
    config.optimizations["fp8"] = float8
    model = build(config, device=at)
    for parameter in model.parameters():  # the layers are created without values
        parameter.data.copy_(torch.randn(parameter.shape, device=at, dtype=dtype) * 0.02)
    patcher = comfy.model_patcher.ModelPatcher(model, at, comfy.model_management.unet_offload_device())
    return patcher, [[torch.randn(1, 77, context), {"pooled_output": torch.randn(1, pooled)}]]
