"""LoRAs after a quantized model on a GPU: loaded, offloaded, and as hooks. Run with `make test-gpu`."""

import comfyui
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU; run `make test-gpu` where there is one")

LAYERS = "middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.0.in_layers.2"


@pytest.fixture(scope="module")
def nodes():
    return comfyui.load_nodes(cpu=not torch.cuda.is_available())


def random_lora(model):
    generator, found = torch.Generator().manual_seed(0), {}
    for name in LAYERS:
        shape = model.model.get_parameter(f"diffusion_model.{name}.weight").shape
        up, down = (torch.randn(size, generator=generator) for size in ((shape[0], 8), (8, *shape[1:])))
        found[f"diffusion_model.{name}.lora_up.weight"] = (up[..., None, None] if len(shape) == 4 else up) / 1000
        found[f"diffusion_model.{name}.lora_down.weight"] = down
    return found


@pytest.mark.parametrize(("precision", "bits"), [("float16", ("4", "16")), ("bfloat16", ("fp8", "8")), ("float16", ("8", "8"))])
@torch.inference_mode()
def test_a_lora_after_quantization_is_the_same_loaded_offloaded_or_by_hooks(nodes, precision, bits):
    import comfy.sd

    source = nodes["IECLoadBuiltinModel"].execute(precision=precision).result[0]
    settings = {"weight_bits": bits[0], "activation_bits": bits[1], "keep_sensitive_layers": True}
    settings |= {"compute": "8-bit"} if bits[1] == "8" else {}
    base, lora = nodes["IECQuantizeModel"].execute(model=source, **settings).result[0], random_lora(source)
    patched = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)[0]
    for name in LAYERS:
        layer = base.model.get_submodule(f"diffusion_model.{name}")
        shape = layer.packing.shape
        x = torch.randn(
            (2, 16, shape[1]) if len(shape) == 2 else (2, shape[1], 8, 8), generator=torch.Generator().manual_seed(1)
        )
        x, found = x.to(base.load_device, source.model.get_dtype()), {}
        for how in ("loaded", "offloaded"):
            patched.load(patched.load_device, **({"full_load": True} if how == "loaded" else {"lowvram_model_memory": 1}))
            assert (layer.weight.device.type == "cuda") == (how == "loaded")
            found[how] = layer(x)
            assert torch.equal(layer(x), found[how])
            patched.detach()
        for how, options in (("plain", None), ("hooks", patched.patches)):
            base.load(base.load_device, full_load=True)
            if options:
                base.patch_hook_weight_to_device(None, options, f"diffusion_model.{name}.weight", None, None)
            found[how] = layer(x)
            base.unpatch_hooks()
            base.detach()
        assert torch.equal(found["loaded"], found["offloaded"]) and torch.equal(found["loaded"], found["hooks"])
        up, down = (lora[f"diffusion_model.{name}.{part}.weight"].to(x.device).double() for part in ("lora_up", "lora_down"))
        change = (up.flatten(1) @ down.flatten(1)).view(shape)
        wanted = x.double() @ change.t() if len(shape) == 2 else torch.nn.functional.conv2d(x.double(), change, padding=1)
        left = found["loaded"].double() - found["plain"].double()
        assert 0.98 < (left * wanted).sum() / wanted.square().sum() < 1.02
