"""IECDeepCache on each of the host's U-Nets: small networks of the host's classes, with its samplers, patches and ControlNets.

The expected result is DeepCache written out over the network's blocks (`Restated`), without any code of the pack.
"""

import copy
import functools
import gc
import inspect
import math
import types
from dataclasses import dataclass, field

import pytest
import torch
from random_weights import randomize


def noise(*shape, seed=0):
    """Return Gaussian noise that is the same whenever it is drawn."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# networks


@dataclass
class Family:
    """A kind of model. config: the host's class. unet: the settings of its network, with 32 channels and short transformers.

    values: of the conditioning. weights: the ones from which the host detects the model's kind. frames: the latents' batch.
    """

    config: str
    unet: dict
    values: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    frames: int = 2


COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "use_spatial_transformer": True,
    "legacy": False, "context_dim": 16, "use_temporal_attention": False, "use_temporal_resblock": False,
}  # fmt: skip
SD1 = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
}  # fmt: skip
SD2 = {**SD1, "use_linear_in_transformer": True}
SDXL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2, "num_classes": "sequential",
    "adm_in_channels": 1536 + 16, "use_linear_in_transformer": True,
}  # fmt: skip
REFINER = {
    **SD2, "transformer_depth": [0, 0, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "num_classes": "sequential", "adm_in_channels": 1280 + 16,
}  # fmt: skip
KOALA = {
    **SDXL, "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 2], "transformer_depth_output": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": -2,
}  # fmt: skip
VIDEO = {
    **SD2, "num_classes": "sequential", "in_channels": 8, "use_temporal_attention": True, "use_temporal_resblock": True,
    "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
    "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
}  # fmt: skip
SHORT = {
    "num_res_blocks": [2], "channel_mult": [1], "transformer_depth": [0, 0], "transformer_depth_output": [0, 1, 0],
    "transformer_depth_middle": -1,
}  # fmt: skip
SHORTEST = {**SHORT, "num_res_blocks": [1], "transformer_depth": [0], "transformer_depth_output": [1, 0]}
SMALL = {
    "num_res_blocks": [1, 1, 1], "channel_mult": [1, 2, 4], "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip

IMAGE = {"concat_latent_image": noise(1, 4, 8, 8, seed=5)}
MASKED = {**IMAGE, "concat_mask": (noise(1, 1, 8, 8, seed=7) > 0).float()}
UPSCALED = {"concat_image": noise(1, 3, 8, 8, seed=5), "noise_augmentation": 0.2}
SEEN = types.SimpleNamespace(image_embeds=noise(1, 1, 16, seed=6))
UNCLIP = {"unclip_conditioning": [{"clip_vision_output": SEEN, "strength": 1.0, "noise_augmentation": 0.1}]}

FAMILIES = {
    "SD 1.5": Family("SD15", SD1),
    "SD 1.5 in-paint": Family("SD15", {**SD1, "in_channels": 9}, MASKED),
    "SD 2": Family("SD20", SD2, weights={"output_blocks.11.1.transformer_blocks.0.norm1.bias": noise(32)}),
    "SD 2 unCLIP": Family("SD21UnclipL", {**SD2, "num_classes": "sequential", "adm_in_channels": 32}, UNCLIP),
    "x4 upscaler": Family("SD_X4Upscaler", {**SD2, "in_channels": 7}, UPSCALED),
    "Lotus": Family("LotusD", {**SD2, "adm_in_channels": 4, "num_heads": 8}),
    "SDXL": Family("SDXL", SDXL),
    "SDXL, v and EDM": Family("SDXL", SDXL, weights={"edm_vpred.sigma_max": torch.tensor(120.0)}),
    "SDXL refiner": Family("SDXLRefiner", REFINER),
    "SSD-1B": Family("SSD1B", {**SDXL, "transformer_depth_middle": -1}),
    "KOALA": Family("KOALA_700M", KOALA),
    "SVD": Family("SVD_img2vid", {**VIDEO, "adm_in_channels": 768}, {**IMAGE, "time_conditioning": noise(1, 5, 16)}, frames=3),
}
# Half of SD 1.5's blocks and one level less, with a transformer at every level: for tests that do not depend on the family.
OTHERS = {"short": Family("SD15", SHORT), "shortest": Family("SD15", SHORTEST), "small": Family("SD15", SMALL)}


def build(family, dtype=torch.float32, compute=None):
    """Return a MODEL of the family, with weights in `dtype`; compute: the dtype that the host casts them to, None for
    no cast.
    """
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, family.config)({**COMMON, **family.unet})
    if config.unet_config.get("num_head_channels", -1) != -1:
        config.unet_config["num_head_channels"] = 8
    if config.noise_aug_config:
        config.noise_aug_config = {**config.noise_aug_config, "timestep_dim": 16}
    config.set_inference_dtype(dtype, compute)
    model = config.get_model(family.weights)
    randomize(model.diffusion_model, seed=1)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def quick_attention(host):
    """Use PyTorch's attention instead of the host's attention for a CPU.

    The host's attention asks for the free memory at each call, which takes a quarter of an evaluation's time, and which no
    compiled graph can contain.
    """
    import comfy.ldm.modules.attention as attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "optimized_attention", attention.attention_pytorch)
        patch.setattr(attention, "optimized_attention_masked", attention.attention_pytorch)
        yield


@pytest.fixture(scope="module")
def models(host):
    """Return models(name, **settings), which gives the family's MODEL, made once."""
    return functools.cache(lambda name, **settings: build({**FAMILIES, **OTHERS}[name], **settings))


def conditioning(name, seed, tokens=7, **values):
    """Return CONDITIONING for the family in the form of its text encoder and the stock nodes."""
    family = {**FAMILIES, **OTHERS}[name]
    return [[noise(1, tokens, 16, seed=seed), {"pooled_output": noise(1, 16, seed=seed + 100), **family.values, **values}]]


@pytest.fixture(scope="module")
def draw(host):
    """Return draw(model, name, size, ...), which gives the latents of four steps of the host's KSampler or another sampling
    node.
    """

    def run(model, name="SD 1.5", size=None, positive=None, negative=None, node="KSampler", steps=4, **settings):
        batch, height, width = size or ({**FAMILIES, **OTHERS}[name].frames, 8, 8)
        return host.run(
            node, model=model, seed=3, steps=steps, cfg=2.0, sampler_name="euler", scheduler="normal", denoise=1.0,
            positive=positive or conditioning(name, 1), negative=negative or conditioning(name, 2),
            latent_image={"samples": noise(batch, 4, height, width)}, **settings,
        )[0]["samples"]  # fmt: skip

    return run


@pytest.fixture(scope="module")
def cached(host):
    return lambda model, interval=3, branch=0: host.run(
        "IECDeepCache", model=model, interval=interval, branch=branch, forecast="hold", schedule="uniform"
    )[0]


@pytest.fixture(scope="module")
def plain_draw(models, draw, cached):
    """Return plain_draw(name, size, branch), which gives the latents of the family's unchanged MODEL, made once.

    It has no cache if branch is None, else the cache with this branch.
    """

    def run(name, size=None, branch=None):
        return draw(models(name) if branch is None else cached(models(name), branch=branch), name, size)

    return functools.cache(run)


# DeepCache, written out


def layers(unet):
    """Yield the network's blocks in the order in which they run: (kind, number, its layers)."""
    yield from (("input", number, block) for number, block in enumerate(unet.input_blocks))
    yield ("middle", 0, unet.middle_block or [])  # some distilled networks have no middle block
    yield from (("output", number, block) for number, block in enumerate(unet.output_blocks))


class Evaluation:
    """An evaluation of a U-Net block by block, with the effects of the host's patches and ControlNets on each block."""

    def __init__(self, unet, context, control, options, video):
        from comfy.ldm.modules.attention import SpatialTransformer

        self.unet, self.context, self.control, self.video = unet, context, control or {}, video
        self.options, self.patches = options, options.get("patches", {})
        self.numbers, total = {}, 0  # of each block's first transformer, counted through the network
        for kind, number, block in layers(unet):
            self.numbers[kind, number] = total
            total += sum(isinstance(layer, SpatialTransformer) for layer in block)

    def embed(self, x, timesteps, y):
        from comfy.ldm.modules.diffusionmodules.openaimodel import timestep_embedding

        self.emb = self.unet.time_embed(timestep_embedding(timesteps, self.unet.model_channels).to(x.dtype))
        for patch in self.patches.get("emb_patch", []):
            self.emb = patch(self.emb, self.unet.model_channels, self.options)
        if y is not None:
            self.emb = self.emb + self.unet.label_emb(y)

    def at(self, kind, number):
        self.options.update(block=(kind, number), transformer_index=self.numbers[kind, number])

    def run(self, block, h, shape=None):
        from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed

        return forward_timestep_embed(block, h, self.emb, self.context, self.options, shape, **self.video)

    def residual(self, h, kind, index):
        """Return h plus the ControlNet's residual at this index of its list, if there is one."""
        residuals = self.control.get(kind) or []
        there = -len(residuals) <= index < len(residuals)
        return h + residuals[index] if there and residuals[index] is not None else h

    def patched(self, name, h):
        for patch in self.patches.get(name, []):
            h = patch(h, self.options)
        return h

    def down(self, h, count):
        """Run the first `count` input blocks; return (the output of the last one, the skip connections)."""
        skips = []
        for number, block in enumerate(self.unet.input_blocks[:count]):
            self.at("input", number)
            h = self.residual(self.run(block, h), "input", -1 - number)
            skips.append(self.patched("input_block_patch", h))
            h = self.patched("input_block_patch_after_skip", skips[-1])
        return h, skips

    def middle(self, h):
        self.at("middle", 0)
        if self.unet.middle_block is not None:
            h = self.run(self.unet.middle_block, h)
        return self.residual(h, "middle", -1)

    def up(self, h, skips, start, end):
        """Run the output blocks start ... end - 1. The inputs are copied, because a patch may change them."""
        for number in range(start, end):
            self.at("output", number)
            place = len(self.unet.output_blocks) - 1 - number
            h, skip = h.clone(), self.residual(skips[place].clone(), "output", place)
            for patch in self.patches.get("output_block_patch", []):
                h, skip = patch(h, skip, self.options)
            shape = skips[place - 1].shape if place else None
            h = self.run(self.unet.output_blocks[number], torch.cat([h, skip], dim=1), shape)
        return h


class Restated:
    """DeepCache around a network.

    Each new sigma is a step, and a step's n-th evaluation reuses the feature of the n-th evaluation of the last full step. This
    is for samplers that evaluate the same conditionings in the same order in all steps.
    """

    def __init__(self, interval, branch):
        self.interval, self.branch = interval, branch
        self.step, self.sigma, self.call = -1, None, 0
        self.features = {}

    def __call__(self, executor, x, timesteps, context, y, control, transformer_options, **video):
        sigma, unet = transformer_options["sigmas"][0].item(), executor.class_obj
        self.call += 1
        if sigma != self.sigma:
            self.step, self.sigma, self.call = self.step + 1, sigma, 0
        evaluation = Evaluation(unet, context, control, {**transformer_options, "original_shape": list(x.shape)}, video)
        evaluation.embed(x, timesteps, y)
        blocks, shallow = len(unet.output_blocks), self.branch + 1
        if self.step % self.interval == 0:
            h, skips = evaluation.down(x, blocks)
            self.features[self.call] = evaluation.up(evaluation.middle(h), skips, 0, blocks - shallow)
        else:
            _, skips = evaluation.down(x, shallow)
        h = evaluation.up(self.features[self.call], skips, blocks - shallow, blocks)
        return unet.out(h.type(x.dtype))


@pytest.fixture
def restated():
    """Return restated(model, interval, branch), which gives a clone of the MODEL, for one run, with DeepCache as written out
    here.
    """
    from comfy.patcher_extension import WrappersMP

    def wrap(model, interval=3, branch=0):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "restated", Restated(interval, branch))
        return model

    return wrap


# each network


BLOCKS_OF_ANOTHER = ("SD 1.5 in-paint", "SD 2 unCLIP", "x4 upscaler", "Lotus", "SDXL, v and EDM")  # SD 1.5's, SD 2's, SDXL's


@pytest.mark.parametrize("name", FAMILIES)
def test_each_unet(models, draw, plain_draw, cached, restated, relative, name):
    """With interval 1 the result is the host's run, bit for bit; with interval 3 it is the restated DeepCache's, not the
    host's.
    """
    model, plain = models(name), plain_draw(name)
    middle = len(model.model.diffusion_model.output_blocks) // 2
    assert torch.equal(draw(cached(model, 1, middle), name), plain)
    for branch in (middle,) if name in BLOCKS_OF_ANOTHER else (0, 1, middle):
        result = draw(cached(model, 3, branch), name)
        assert relative(result, draw(restated(model, 3, branch), name)) < 1e-4
        assert relative(result, plain) > 1e-3


def image_only(model):
    """Return the MODEL with an indicator, as in the video networks, that the first frame is an image of its own."""

    def tell(apply_model, arguments):
        only = torch.zeros(len(arguments["cond_or_uncond"]), FAMILIES["SVD"].frames)
        only[:, 0] = 1
        return apply_model(arguments["input"], arguments["timestep"], image_only_indicator=only, **arguments["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(tell)
    return model


def test_video_frames(models, draw, plain_draw, cached, restated, relative):
    model = image_only(models("SVD"))
    result = draw(cached(model, branch=2), "SVD")
    assert relative(result, draw(restated(model, branch=2), "SVD")) < 1e-4
    assert relative(result, plain_draw("SVD", branch=2)) > 1e-3


@pytest.mark.parametrize("node", ["IECKSampler", "SamplerCustomAdvanced"])
def test_each_kind_of_sampling(host, models, draw, cached, advanced, node):
    """KSampler, which all other tests here use, and the other nodes give the same run."""
    model = cached(models("SDXL"))
    if node == "IECKSampler":
        correction = {"correction_steps": "none", "lambda_": 0.5, "max_iterations": 1, "tolerance": 0.0}
        result = draw(model, "SDXL", node=node, **correction)
    else:
        inputs = {"positive": conditioning("SDXL", 1), "negative": conditioning("SDXL", 2), "cfg": 2.0}
        guider = host.run("CFGGuider", model=model, **inputs)[0]
        result = advanced(guider, seed=3, steps=4, scheduler="normal", latent={"samples": noise(2, 4, 8, 8)})
    assert torch.equal(result, draw(model, "SDXL"))


# ControlNets


def control_net(model):
    import comfy.cldm.cldm
    import comfy.controlnet

    config = {name: value for name, value in model.model.model_config.unet_config.items() if name != "dtype"}
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32)
    randomize(network, seed=4)
    return comfy.controlnet.ControlNet(network, load_device=model.load_device)


def t2i_adapter(model):
    """Return a T2I-Adapter that has a residual for one input block of each level, and None for the others."""
    import comfy.controlnet
    import comfy.t2i_adapter.adapter

    network = comfy.t2i_adapter.adapter.Adapter_light(channels=[32, 64, 128, 128], nums_rb=1, cin=192)
    randomize(network, seed=4)
    return comfy.controlnet.T2IAdapter(network, 3, 8, "nearest-exact")


def both(model):
    first = control_net(model).set_cond_hint(noise(1, 3, 64, 64, seed=12), 0.3, (0.0, 1.0))
    return t2i_adapter(model).set_previous_controlnet(first)


@pytest.mark.parametrize(
    ("name", "make", "end"),
    [
        ("small", control_net, 1.0),
        ("SDXL", control_net, 1.0),
        ("SD 1.5", t2i_adapter, 1.0),
        ("SD 1.5", both, 1.0),
        ("small", control_net, 0.3),
    ],
)
def test_control(host, models, draw, plain_draw, cached, restated, relative, caplog, name, make, end):
    """Residuals of the skipped blocks are dropped, and the other residuals reach their blocks."""
    model = models(name)
    positive, negative = host.run(
        "ControlNetApplyAdvanced", positive=conditioning(name, 1), negative=conditioning(name, 2), control_net=make(model),
        image=noise(1, 64, 64, 3, seed=11).sigmoid(), strength=0.7, start_percent=0.0, end_percent=end,
    )  # fmt: skip
    inputs = {"name": name, "positive": positive, "negative": negative}
    uncached = draw(model, **inputs)
    for branch in (0, 3):
        result = draw(cached(model, branch=branch), **inputs)
        assert relative(result, draw(restated(model, branch=branch), **inputs)) < 1e-4
        assert relative(result, plain_draw(name, branch=branch)) > 1e-3
        assert relative(result, uncached) > 1e-3
    assert "control could not be applied" not in caplog.text  # the host's message for a residual at a block of another shape


# patches


def place(options):
    """Return a factor near 1 that differs between the transformer blocks of a network."""
    kind, number = options["block"]
    return 1 + 0.3 * math.sin(number + 5 * len(kind) + 0.7 * options["transformer_index"] + 0.3 * options["block_index"])


def places(model):
    """Yield (kind, number, index within the block) of all transformer blocks."""
    from comfy.ldm.modules.attention import SpatialTransformer

    for kind, number, block in layers(model.model.diffusion_model):
        for transformer in (layer for layer in block if isinstance(layer, SpatialTransformer)):
            yield from ((kind, number, index) for index in range(len(transformer.transformer_blocks)))


def image_prompt(host, model):
    """Add attention to further tokens next to the context's, as the IP-Adapter nodes add it to each transformer block."""
    from comfy.ldm.modules.attention import optimized_attention

    def attend(q, k, v, options):
        tokens = noise(1, 4, q.shape[-1], seed=20 + options["transformer_index"]).expand(q.shape[0], -1, -1)
        out = optimized_attention(q, k, v, options["n_heads"])
        return out + place(options) * optimized_attention(q, tokens, tokens, options["n_heads"])

    for kind, number, index in places(model):
        model.set_model_attn2_replace(attend, kind, number, index)
    return model


def replaced_self_attention(host, model):
    for kind, number, _ in places(model):
        model.set_model_attn1_replace(lambda q, k, v, options: v * place(options), kind, number)
    return model


def attention_patches(host, model):
    model.set_model_attn1_patch(lambda n, context, value, options: (n, context, value * place(options)))
    model.set_model_attn2_patch(lambda n, context, value, options: (n * place(options), context, value))
    model.set_model_attn1_output_patch(lambda n, options: n * place(options))
    model.set_model_attn2_output_patch(lambda n, options: n * place(options))
    model.set_model_patch(lambda n, options: n * place(options), "middle_patch")
    return model


def block_patches(host, model):
    def factor(options):
        return 1 + 0.2 * math.sin(options["block"][1] + 0.7 * options["transformer_index"])

    model.set_model_input_block_patch(lambda h, options: h * factor(options))
    model.set_model_input_block_patch_after_skip(lambda h, options: h + 0.1 * factor(options))
    model.set_model_output_block_patch(lambda h, skip, options: (h * factor(options), skip - 0.1 * factor(options)))
    model.set_model_emb_patch(lambda emb, channels, options: emb * 1.1)
    return model


def layer_patch(host, model):
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

    model.set_model_forward_timestep_embed_patch((Downsample, lambda layer, x, *_: layer(x) * 1.3))
    return model


def stock(node, **settings):
    return lambda host, model: host.run(node, model=model, **settings)[0]


def tiles(host, model):
    made = host.nodes["HyperTile"].execute(model=model, tile_size=32, swap_size=1, max_depth=1, scale_depth=False)
    return getattr(made, "result", made)[0]  # an older host's node gives a plain tuple


def deep_shrink(block, after_skip=True, end=1.0):
    return stock(
        "PatchModelAddDownscale", block_number=block, downscale_factor=2.0, start_percent=0.0, end_percent=end,
        downscale_after_skip=after_skip, downscale_method="bicubic", upscale_method="bicubic",
    )  # fmt: skip


SHALLOW_LAYER = ("output_blocks.5.1.transformer_blocks.0.attn2.to_v", 32, 16)
DEEP_LAYER = ("middle_block.1.transformer_blocks.0.attn2.to_v", 128, 16)


def random_lora(*layers):
    """Return a LoRA for these layers (name, outputs, inputs) with the host's own keys."""
    factors = {}
    for seed, (layer, out, into) in enumerate(layers):
        factors[f"diffusion_model.{layer}.lora_up.weight"] = noise(out, 4, seed=seed)
        factors[f"diffusion_model.{layer}.lora_down.weight"] = noise(4, into, seed=seed + 50) / into**0.5
    return factors


def lora(*layers):
    def patch(host, model):
        import comfy.sd

        return comfy.sd.load_lora_for_models(model, None, random_lora(*layers), 1.0, 0.0)[0]

    return patch


FREE_U = {"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
PATCHES = {
    "image prompt": image_prompt,
    "replaced self-attention": replaced_self_attention,
    "attention": attention_patches,
    "blocks": block_patches,
    "layers": layer_patch,
    "FreeU": stock("FreeU", **FREE_U),
    "FreeU 2": stock("FreeU_V2", **FREE_U),
    "deep shrink of a block that is run": deep_shrink(1),
    "deep shrink before the skip": deep_shrink(1, after_skip=False),
    "deep shrink of the last block that is run": deep_shrink(3),
    "deep shrink of a skipped block": deep_shrink(4),
    "deep shrink in the first steps": deep_shrink(1, end=0.1),
    "tiles": tiles,
    "merged tokens": stock("TomePatchModel", ratio=0.5),
    "PAG": stock("PerturbedAttentionGuidance", scale=1.0),
    "SAG": stock("SelfAttentionGuidance", scale=0.7, blur_sigma=2.0),
    "LoRA on a block that is run": lora(SHALLOW_LAYER),
    "LoRA on a skipped block": lora(DEEP_LAYER),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_patches(host, models, draw, plain_draw, cached, restated, relative, patch):
    """A node's patch affects the blocks that run exactly as without the cache, whether it is applied before or after
    the cache.
    """
    model, apply, size = models("small"), PATCHES[patch], (1, 16, 16)
    expected = draw(restated(apply(host, model.clone()), branch=3), size=size)
    assert relative(draw(cached(apply(host, model.clone()), branch=3), size=size), expected) < 1e-4
    assert relative(draw(apply(host, cached(model, branch=3)), size=size), expected) < 1e-4
    assert relative(plain_draw("small", size, 3), expected) > 1e-3


def lora_hook(model):
    """Return a conditioning with hooks that change weights, unlike the negative's, of blocks that run and of skipped ones."""
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(random_lora(SHALLOW_LAYER, DEEP_LAYER), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning("SD 1.5", 1), hooks)


def gligen(model):
    """Return a conditioning with GLIGEN boxes. GLIGEN's network has a module per transformer, selected by the transformer's
    number.
    """
    import comfy.gligen
    import comfy.model_patcher
    from comfy.ldm.modules.attention import SpatialTransformer

    widths = [layer.in_channels for layer in model.model.diffusion_model.modules() if isinstance(layer, SpatialTransformer)]
    modules = [comfy.gligen.GatedSelfAttentionDense(width, 16, 8, width // 8) for width in widths]
    network = comfy.gligen.Gligen(modules, comfy.gligen.PositionNet(16, 16), 16)
    randomize(network, seed=6)
    for module in modules:
        module.alpha_attn.fill_(2.0)
        module.alpha_dense.fill_(2.0)
    patcher = comfy.model_patcher.ModelPatcher(network, model.load_device, model.offload_device)
    return conditioning("SD 1.5", 1, gligen=("position", patcher, [(noise(1, 16, seed=7), 4, 4, 0, 2)]))


@pytest.mark.parametrize("make", [lora_hook, gligen])
def test_patches_of_one_conditioning(models, draw, plain_draw, cached, restated, relative, make):
    model = models("small")
    uncached = draw(model, positive=make(model))
    for branch in (0, 3):
        result = draw(cached(model, branch=branch), positive=make(model))
        assert relative(result, draw(restated(model, branch=branch), positive=make(model))) < 1e-4
        assert relative(result, plain_draw("small", branch=branch)) > 1e-3
        assert relative(result, uncached) > 1e-3


def note_calls(model, calls):
    """Make patches of all kinds record in `calls` what they get: their kind, the block, the numbers and the shapes."""

    def note(patch, options, *tensors):
        seen = [options[name] for name in ("transformer_index", "cond_or_uncond", "original_shape")]
        if patch == "attention":
            seen += [options["block_index"], options["activations_shape"]]
        calls.append((patch, options["block"], *seen, *(tensor.shape for tensor in tensors)))
        return tensors[0]

    model.set_model_attn2_patch(lambda n, context, value, options: (note("attention", options, n), context, value))
    model.set_model_input_block_patch(lambda h, options: note("input", options, h))
    model.set_model_input_block_patch_after_skip(lambda h, options: note("after the skip", options, h))
    model.set_model_output_block_patch(lambda h, skip, options: (note("output", options, h, skip), skip))


@pytest.mark.parametrize(("name", "branch"), [("SD 1.5", 0), ("SD 1.5", 6), ("SD 1.5", 11), ("SDXL", 5), ("KOALA", 3)])
def test_patches_are_called_as_without_the_cache(models, draw, cached, name, branch):
    """A cached step calls the patches of the blocks that run exactly as an uncached run's step, in the same order."""
    model, first = models(name), len(models(name).model.diffusion_model.output_blocks) - 1 - branch
    plain, expected, calls = [], [], []
    for patched, seen in ((model.clone(), plain), (cached(model, branch=branch), calls)):
        note_calls(patched, seen)
        draw(patched, name)
    for at, call in enumerate(plain):
        step, (kind, number) = at * 4 // len(plain), call[1]
        if step in (0, 3) or (kind == "input" and number <= branch) or (kind == "output" and number >= first):
            expected.append(call)
    assert calls == expected


def test_a_patch_after_the_middle_block_is_refused(models, draw, cached):
    """SUPIR's patches of later blocks use the result of its patch after the middle block.

    A cached step skips that patch, and the later patches would silently use another step's result.
    """
    model = cached(models("SD 1.5"))
    model.set_model_patch(lambda arguments: arguments, "middle_block_after_patch")
    with pytest.raises(ValueError, match=r"^model: .* SUPIR"):
        draw(model)


# sizes, precisions, batches


@pytest.mark.parametrize("name", ["small", "KOALA"])
@pytest.mark.parametrize("size", [(1, 9, 11), (3, 13, 7)])
def test_odd_sizes(models, draw, cached, restated, relative, name, size):
    """Test transformers with convolutions and with Linear layers, and with each level's blocks run and skipped."""
    model = models(name)
    plain = draw(model, name, size)
    for branch in (0, 2, 4):
        result = draw(cached(model, branch=branch), name, size)
        assert relative(result, draw(restated(model, branch=branch), name, size)) < 1e-4
        assert relative(result, plain) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_precisions(models, draw, cached, restated, relative, dtype, compute):
    """A feature has the dtype and the device of the network's computation, whatever the weights have."""
    model, seen = models("small", dtype=dtype, compute=compute), set()

    def note(h, skip, options):
        seen.update((tensor.dtype, tensor.device.type) for tensor in (h, skip))
        return h, skip

    patched = cached(model, branch=3)
    patched.set_model_output_block_patch(note)
    result = draw(patched)
    assert seen == {(compute or dtype, "cpu")}
    assert relative(result, draw(restated(model, branch=3))) < 1e-4
    assert relative(result, draw(model)) > 1e-3


def areas(host):
    """Return a prompt for the whole image, for two areas of one size, and for an area of another size; one of them is twice as
    long.
    """
    whole = conditioning("SD 1.5", 1, tokens=77)
    for seed, tokens, (width, height, x, y) in ((4, 77, (64, 32, 0, 0)), (5, 154, (64, 32, 0, 32)), (6, 77, (40, 56, 24, 0))):
        part = conditioning("SD 1.5", seed, tokens)
        part = host.run("ConditioningSetArea", conditioning=part, width=width, height=height, x=x, y=y, strength=2.0)[0]
        whole = host.run("ConditioningCombine", conditioning_1=whole, conditioning_2=part)[0]
    return whole


@pytest.mark.parametrize("split", [False, True])
def test_areas_and_prompts_of_several_lengths(host, models, draw, cached, restated, relative, monkeypatch, split):
    """A step has several evaluations, batched or, if memory is short, one by one: each finds its own feature again."""
    import comfy.model_base

    if split:
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e30)
    model, positive = models("small"), areas(host)
    result = draw(cached(model, branch=1), positive=positive)
    assert relative(result, draw(restated(model, branch=1), positive=positive)) < 1e-4
    assert relative(result, draw(model, positive=positive)) > 1e-3


@pytest.mark.parametrize("name", ["small", "SVD"])
def test_context_windows(host, models, draw, cached, restated, relative, name):
    """A batch is evaluated in overlapping windows: a conditioning has a feature for each window.

    The batch is as large as the number of sigmas, because an older host compares the two.
    """
    settings = {
        "context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 0, "freenoise": False, "causal_window_fix": False,
    }  # fmt: skip
    known = inspect.signature(host.nodes["ContextWindowsManual"].execute).parameters
    settings = {setting: value for setting, value in settings.items() if setting in known}
    windowed, size = host.run("ContextWindowsManual", model=models(name), **settings)[0], (5, 8, 8)
    result = draw(cached(windowed), name, size)
    assert relative(result, draw(restated(windowed), name, size)) < 1e-4
    assert relative(result, draw(windowed, name, size)) > 1e-3


def test_runs_one_after_another(models, draw, cached, restated, relative):
    """A run reuses nothing from the run before it, whether its size is the same or not."""
    model = models("small")
    patched = cached(model)
    for size, seed, tokens in (((2, 8, 8), 1, 7), ((1, 8, 8), 1, 7), ((1, 16, 8), 1, 7), ((2, 8, 8), 4, 14), ((2, 8, 8), 1, 7)):
        inputs = {"size": size, "positive": conditioning("SD 1.5", seed, tokens)}
        assert relative(draw(patched, **inputs), draw(restated(model), **inputs)) < 1e-4


# how the host runs a network


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_low_memory(host, models, draw, cached, relative, monkeypatch, share):
    """The host has not loaded all or some of the weights: their layers cast and patch them at each call."""
    import comfy.model_patcher

    load = comfy.model_patcher.ModelPatcher.load
    model = lora(SHALLOW_LAYER, DEEP_LAYER)(host, models("small").clone())
    patched, network = cached(model, branch=1), model.model
    expected = draw(patched)

    def load_in_part(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        return load(self, device_to, max(1, int(share * self.model_size())), force_patch_weights, False)

    patched.detach()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", load_in_part)
    try:
        result = draw(patched)
        assert network.model_lowvram
        assert any(getattr(layer, "weight_function", []) for layer in network.modules())
        assert any(hasattr(layer, "comfy_patched_weights") for layer in network.modules()) == (share > 0)
    finally:
        patched.detach()
    assert relative(result, expected) < 1e-4


def tensors():
    gc.collect()
    return [value for value in gc.get_objects() if type(value) is torch.Tensor]


@pytest.mark.parametrize("end", ["as it should", "error", "interrupt"])
def test_no_feature_outlives_its_run(models, draw, cached, end):
    import comfy.model_management

    model, calls, last = models("small"), [], 6 + 3 + 2
    patched = cached(model, branch=2)
    draw(model)

    def stop(h, skip, options):
        calls.append(options["block"])
        if len(calls) == last and end == "error":  # in the second cached step
            raise RuntimeError("stop here")
        if len(calls) == last and end == "interrupt":
            comfy.model_management.interrupt_current_processing()
        return h, skip

    patched.set_model_output_block_patch(stop)
    before = tensors()
    known = {id(tensor) for tensor in before}
    if end == "as it should":
        draw(patched)
    else:
        stopped = RuntimeError if end == "error" else comfy.model_management.InterruptProcessingException
        with pytest.raises(stopped):
            draw(patched)
        assert len(calls) == last
    assert [tensor.shape for tensor in tensors() if id(tensor) not in known and tensor.dim() == 4] == []


def convolutions(run, *arguments):
    """Return (the result of run(...), the number of its convolutions)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run(*arguments)
    return result, sum(event.count for event in profile.key_averages() if event.key == "aten::convolution")


def test_compiled(host, models, draw, cached, relative, graphs):
    """A network is compiled as a whole, once with all blocks and once with the shallow ones, whatever was compiled before."""

    def compiled(model):
        return host.run("TorchCompileModel", model=model, backend="eager")[0]

    model = models("short")
    plain, total = convolutions(draw, model, "short")
    expected, fewer = convolutions(draw, cached(model), "short")
    assert relative(expected, plain) > 1e-3 and fewer < total

    assert relative(draw(compiled(model), "short"), plain) < 1e-4 and graphs() == 1
    for patched in (cached(compiled(model)), compiled(cached(model))):
        assert relative(draw(patched, "short"), expected) < 1e-4 and graphs() == 3
        again, count = convolutions(draw, patched, "short")
        assert relative(again, expected) < 1e-4 and graphs() == 3
        assert count == fewer
    assert relative(draw(compiled(model), "short"), plain) < 1e-4
    assert relative(draw(compiled(cached(model, branch=1)), "short"), draw(cached(model, branch=1), "short")) < 1e-4


def test_two_networks_in_turn_have_their_own_features(models, draw, cached):
    """A guider may evaluate the prompt with another network first, in a part of the run. Here its prediction is not used."""
    import comfy.samplers

    model = models("short")
    other = copy.copy(model.model)
    other._modules = {**model.model._modules, "diffusion_model": copy.deepcopy(model.model.diffusion_model)}
    for weight in other.diffusion_model.parameters():
        weight.data.mul_(0.9)

    def guided(model):
        def calculate(args):
            inputs = args["conds"], args["input"], args["sigma"], args["model_options"]
            if len(seen) < 2:
                comfy.samplers.calc_cond_batch(other, *inputs)
            seen.append(args["sigma"])
            return comfy.samplers.calc_cond_batch(args["model"], *inputs)

        seen, model = [], model.clone()
        model.set_model_sampler_calc_cond_batch_function(calculate)
        return model

    other.current_patcher = model
    expected = draw(cached(model, interval=9), "short")
    assert torch.equal(draw(guided(cached(model, interval=9)), "short"), expected)
    assert not torch.equal(draw(model, "short"), expected)


def test_compiled_by_an_object_patch(models, draw, cached, relative, graphs):
    """ComfyUI's older way to compile a network, which other packs still use."""
    model = models("short")
    compiled = model.clone()
    network = compiled.get_model_object("diffusion_model")
    compiled.add_object_patch("diffusion_model", torch.compile(network, backend="eager"))
    expected = draw(cached(model), "short")
    assert relative(expected, draw(model, "short")) > 1e-3
    assert relative(draw(cached(compiled), "short"), expected) < 1e-4 and graphs() >= 1


@pytest.mark.parametrize("weight_bits", ["8", "4"])
def test_compiled_with_quantized_layers(host, models, draw, relative, graphs, weight_bits):
    # The layers of one block, both Linear and convolutions: each takes a second to compile.
    bits = {"weight_bits": weight_bits, "activation_bits": "8", "keep_sensitive_layers": False, "include": "output_blocks.0.*"}
    quantized = host.run("IECQuantizeModel", model=models("shortest"), **bits)[0]
    layers = [layer for layer in quantized.model.diffusion_model.modules() if hasattr(layer, "packing")]
    assert {tuple(layer.packing.shape[2:]) for layer in layers} == {(), (1, 1), (3, 3)}
    compiled = host.run("TorchCompileModel", model=quantized, backend="eager")[0]
    assert relative(draw(compiled, "shortest"), draw(quantized, "shortest")) < 1e-5 and graphs() == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_quantized(models, draw, rounded, relative, name):
    """Every family's Linear and Conv2d layers can be quantized. One step runs them all."""
    model = models(name)
    quantized, reference = rounded(model)
    result, expected, plain = (draw(one, name, steps=1) for one in (quantized, reference, model))
    assert relative(result, expected) < 1e-4 < relative(expected, plain)
