"""Dummy files for the models that the example workflows load."""

FILES = {
    "checkpoints": ["v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors"],
    "diffusion_models": ["flux1-dev.safetensors"],
    "text_encoders": ["clip_l.safetensors", "t5xxl_fp16.safetensors"],
    "vae": ["ae.safetensors"],
}


def write(folder):
    """Write a file of each name into a folder of models, and return the folder. No loader accepts the contents."""
    for kind, names in FILES.items():
        (folder / kind).mkdir(parents=True)
        for name in names:
            (folder / kind / name).write_bytes(b"no model")
    return folder
