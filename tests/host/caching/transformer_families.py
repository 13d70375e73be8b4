"""Small networks of the host's transformer classes, with random weights, and how each one's blocks pass on their streams."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch


def noise(*shape, seed=0):
    """Return Gaussian noise that is the same in each run of the tests."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Family:
    """A kind of transformer.

    config: the host's class. network: its unet_config. latent: the shape, or shapes. text: the dimension of a token. lists:
    {path of the blocks: the streams that a block passes on}, in the order in which a block returns them; each stream is the
    position or name of its argument. values: of the conditioning; a function gets the seed. newer: network settings for later
    hosts only. weights: in addition to the network's. method: the method with which the host runs a block. small: replaces
    parts of the network whose size is not in its settings. batch: the dimension of a stream in which the items of a batch are.
    branches: the tested ones.
    """

    config: str
    network: dict
    latent: tuple
    lists: dict
    text: int = 12
    values: dict = field(default_factory=dict)
    newer: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    method: str = "forward"
    small: Callable = lambda network: None
    batch: int = 0
    branches: tuple = (-1, 0, 1)


def small_adapter(network):
    """Replace Anima's text adapter, whose size is fixed (130 million weights), by a small one."""
    import comfy.ops

    network.llm_adapter = type(network.llm_adapter)(
        source_dim=12, target_dim=12, model_dim=32, num_layers=1, num_heads=2, operations=comfy.ops.disable_weight_init
    )


def one_lyric_encoder(network):
    """Leave one of ACE-Step's six lyric encoders, whose number and width (1024) are fixed."""
    del network.lyric_encoder.encoders[1:]


def small_music(network):
    """Replace the parts of MiniMax Music's network, whose size is fixed (2.4 billion weights), by small ones."""
    import comfy.ldm.minimax_music.dit
    import comfy.ops

    ops, whole, width, condition = comfy.ops.disable_weight_init, network.diffusion_transformer, 32, 16
    channels = 2 * 128 + condition
    network.latent_conditioners[0] = ops.Conv1d(4096, condition, kernel_size=3, padding=1)
    whole.preprocess_conv = ops.Conv1d(channels, channels, 1, bias=False)
    whole.to_timestep_embed = torch.nn.Sequential(ops.Linear(256, width), torch.nn.SiLU(), ops.Linear(width, width))
    whole.transformer.project_in = ops.Linear(channels, width, bias=False)
    whole.transformer.project_out = ops.Linear(width, 128, bias=False)
    block = comfy.ldm.minimax_music.dit.TransformerBlock
    whole.transformer.layers = torch.nn.ModuleList(block(width, 32, 64, torch.float32, None, ops) for _ in range(5))


BOTH = {"double_blocks": ("img", "txt"), "single_blocks": (0,)}
QWEN_BLOCKS = {"transformer_blocks": ("encoder_hidden_states", "hidden_states")}
ONE = {"blocks": (0,)}
IMAGE, VIDEO, WIDE = (2, 16, 10, 14), (1, 16, 2, 8, 12), (1, 128, 6, 8)
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 12, "hidden_size": 32,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 3, "depth_single_blocks": 4, "axes_dim": [4, 6, 6], "theta": 10000,
    "qkv_bias": True, "guidance_embed": True, "patch_size": 2,
}  # fmt: skip
FLUX2 = {
    "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "qkv_bias": False,
    "axes_dim": [4, 4, 4, 4], "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
}  # fmt: skip
CHROMA = {
    **{name: FLUX[name] for name in FLUX if name not in ("vec_in_dim", "guidance_embed")}, "image_model": "chroma",
    "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 2,
}  # fmt: skip
RADIANCE = {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 32, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
}  # fmt: skip
IDS = {"txt_ids_dims": []}
CHROMA_IDS = {**IDS, "vec_in_dim": None}
SD3 = {
    "in_channels": 16, "out_channels": 16, "input_size": None, "patch_size": 2, "depth": 2, "num_blocks": 5,
    "adm_in_channels": 8, "pos_embed_max_size": 16, "num_patches": 256, "qk_norm": "rms", "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [0, 1],
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 12, "out_features": 128}},
}  # fmt: skip
AURA = {
    "cond_seq_dim": 12, "dim": 64, "n_layers": 6, "n_double_layers": 4, "n_heads": 4, "global_conddim": 64, "max_seq": 256,
}  # fmt: skip
HUNYUAN_DIT = {
    "image_model": "hydit1", "hidden_size": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "text_states_dim": 12,
    "text_states_dim_t5": 16, "text_len": 7, "text_len_t5": 5, "size_cond": True, "use_style_cond": True, "input_size": None,
}  # fmt: skip
HUNYUAN_VIDEO = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 12,
    "hidden_size": 128, "mlp_ratio": 1.0, "num_heads": 8, "depth": 3, "depth_single_blocks": 4, "axes_dim": [4, 6, 6],
    "theta": 256, "patch_size": [1, 2, 2], "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
MOCHI = {
    "image_model": "mochi_preview", "in_channels": 12, "depth": 5, "hidden_size_x": 48, "hidden_size_y": 32, "num_heads": 4,
    "mlp_ratio_x": 256.0,  # the host's class accepts only an MLP of this width
    "mlp_ratio_y": 2.0, "learn_sigma": False, "t5_feat_dim": 16, "t5_token_length": 7, "use_t5": True, "qk_norm": True,
    "qkv_bias": False, "out_bias": True, "timestep_scale": 1000.0, "use_extended_posenc": True, "posenc_preserve_area": True,
}  # fmt: skip
LTXV = {
    "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2,
    "caption_channels": 12, "num_layers": 5,
}  # fmt: skip
LTXAV = {
    **LTXV, "image_model": "ltxav", "audio_in_channels": 128, "audio_cross_attention_dim": 32, "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2, "connector_attention_head_dim": 6, "connector_num_attention_heads": 2,
    "audio_connector_attention_head_dim": 6, "audio_connector_num_attention_heads": 2, "connector_num_layers": 1,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 12, "num_heads": 4,
    "num_layers": 5, "in_dim": 16, "out_dim": 16,
}  # fmt: skip
VACE = {"model_type": "vace", "vace_layers": 3, "num_layers": 6, "vace_in_dim": 96}
S2V = {"model_type": "s2v", "audio_dim": 16, "num_audio_token": 2, "audio_inject_layers": [0, 2, 3], "cond_dim": 16}
ANIMATE = {"model_type": "animate", "in_dim": 36, "motion_encoder_dim": 32}
DANCER = {
    "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2], "music_dim": 32, "music_heads": 2,
    "music_latent_dim": 32,
}  # fmt: skip
HEADS = {"num_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2}
ROPE = {"axes_dims_rope": (4, 6, 6)}
SHAPE = {"in_channels": 64, "context_in_dim": 12, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 3}
SHAPE21 = {
    "in_channels": 64, "context_dim": 12, "hidden_size": 32, "num_heads": 2, "depth": 7, "num_moe_layers": 2, "num_experts": 3,
    "guidance_cond_proj_dim": 32,
}  # fmt: skip
AUDIO = {
    "audio_model": "dit1.0", "io_channels": 64, "embed_dim": 128, "cond_token_dim": 768, "project_cond_tokens": True,
    "global_cond_dim": 1536, "project_global_cond": True, "depth": 5, "num_heads": 2,
}  # fmt: skip
SECONDS = {
    f"conditioner.conditioners.seconds_{end}.embedder.embedding.{name}": noise(*shape, seed=seed) / 16
    for end in ("start", "total")
    for seed, (name, shape) in enumerate({"0.weights": (128,), "1.weight": (768, 257), "1.bias": (768,)}.items())
}
KANDINSKY = {
    "image_model": "kandinsky5", "in_text_dim": 12, "in_text_dim2": 8, "time_dim": 32, "model_dim": 32, "ff_dim": 64,
    "visual_embed_dim": 132, "num_text_blocks": 1, "num_visual_blocks": 5, "axes_dims": (4, 6, 6),
}  # fmt: skip
SEEDVR = {
    "image_model": "seedvr2", "norm_eps": 1e-5, "num_layers": 6, "mlp_type": "swiglu", "vid_dim": 32, "txt_in_dim": 12,
    "heads": 2, "head_dim": 16, "mm_layers": 2, "expand_ratio": 2, "rope_dim": 12, "vid_out_norm": True,
}  # fmt: skip
MINIMAX = {
    **HEADS, "image_model": "minimax_h3", "hidden_size": 32, "token_refiner_num_layers": 1, "ffn_hidden_size": 64,
    "text_dim": 12, "timestep_input_dim": 16, "time_embed_hidden_size": 32, "time_embed_dim": 16, "rope_inv_freq_len": 2,
}  # fmt: skip
HIDREAM = {
    "image_model": "hidream_o1",
    "text_config_overrides": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "rope_dims": [4, 2, 2],
    },
    "vision_config_overrides": {
        "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "depth": 1, "num_position_embeddings": 16,
    },
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 12, "n_layers": 5,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [8, 8, 8], "axes_lens": [30, 30, 30],
    "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0,
}  # fmt: skip
Z_IMAGE = {
    **LUMINA, "dim": 256,  # the host's class accepts only a width of at least 256 with the modulation of this model
    "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
PIXART = {
    "image_model": "pixart_alpha", "patch_size": 2, "in_channels": 4, "depth": 5, "hidden_size": 48, "num_heads": 2,
    "caption_channels": 12, "model_max_length": 7, "micro_condition": True,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos", "max_img_h": 32, "max_img_w": 32, "max_frames": 8, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 32, "block_config": "FA-CA-MLP", "concat_padding_mask": True,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": False, "pos_emb_interpolation": "crop", "block_x_format": "THWBD",
    "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 5, "num_heads": 2,
    "crossattn_emb_channels": 12, "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 2.0,
}  # fmt: skip
ONLY_COSMOS_1 = "block_config", "block_x_format", "affline_emb_norm", "extra_per_block_abs_pos_emb_type"
PREDICT2 = {
    **{name: COSMOS[name] for name in COSMOS if name not in ONLY_COSMOS_1}, "image_model": "cosmos_predict2",
    "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
HIDREAM_I1 = {
    "image_model": "hidream", "attention_head_dim": 16, "axes_dims_rope": [8, 4, 4], "caption_channels": [12, 10],
    "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1, 2, 3, 4, 5, 5], "num_attention_heads": 2,
    "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 3, "num_single_layers": 4, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": 8,
}  # fmt: skip
OMNIGEN2 = {
    "image_model": "omnigen2", "axes_dim_rope": [4, 6, 6], "axes_lens": [64, 32, 32], "ffn_dim_multiplier": None,
    "hidden_size": 32, "in_channels": 16, "multiple_of": 32, "norm_eps": 1e-5, "num_attention_heads": 2, "num_kv_heads": 1,
    "num_layers": 5, "num_refiner_layers": 1, "out_channels": None, "patch_size": 2, "text_feat_dim": 12,
    "timestep_scale": 1000.0,
}  # fmt: skip
ACE = {
    "audio_model": "ace", "attention_head_dim": 16, "in_channels": 8, "inner_dim": 32, "max_height": 16, "max_position": 64,
    "max_width": 64, "mlp_ratio": 2.5, "num_attention_heads": 2, "num_layers": 5, "out_channels": 8, "patch_size": [16, 1],
    "rope_theta": 1000000.0, "speaker_embedding_dim": 512, "text_embedding_dim": 12, "ssl_encoder_depths": [2, 2],
    "ssl_latent_dims": [8, 8], "ssl_names": ["mert", "m-hubert"], "lyric_encoder_vocab_size": 50,
    "lyric_hidden_size": 1024,  # the width of the host's encoder of lyrics
}  # fmt: skip
CASCADE = {
    "stable_cascade_stage": "c", "c_cond": 32, "c_hidden": [32, 48], "nhead": [2, 3], "blocks": [[1, 2], [2, 1]],
    "c_clip_text": 12, "c_clip_text_pooled": 8, "c_r": 16,
}  # fmt: skip
CASCADE_B = {
    "stable_cascade_stage": "b", "c_cond": 32, "c_hidden": [32, 48], "nhead": [-1, 3], "blocks": [[1, 2], [2, 1]], "c_r": 16,
    "block_repeat": [[1, 1], [2, 2]], "level_config": ["CT", "CTA"], "c_clip": 8, "dropout": [0.0, 0.0], "c_clip_seq": 2,
}  # fmt: skip
MASK = {"attention_mask": torch.ones(1, 7, dtype=torch.long)}
T5 = {
    "conditioning_mt5xl": lambda seed: noise(1, 5, 16, seed=seed + 50), "attention_mask": torch.ones(1, 7),
    "attention_mask_mt5xl": torch.ones(1, 5),
}  # fmt: skip
TOKENS = {"text_input_ids": lambda seed: torch.randint(0, 1000, (1, 9), generator=torch.Generator().manual_seed(seed))}
LTX_BLOCKS = {"transformer_blocks": (0,)}
LLAMA = {"conditioning_llama3": lambda seed: noise(1, 6, 5, 10, seed=seed + 50)}
LYRICS = {
    "conditioning_lyrics": lambda seed: torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(seed)),
    "lyrics_strength": 0.9,
}  # fmt: skip
JOY = {"image_model": "joyimage", "text_dim": 12, "mlp_width_ratio": 2.0, "num_layers": 5, "rope_dim_list": [4, 6, 6]}
ANIMA = {
    "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": 32, "crossattn_emb_channels": 12,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": 5, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
T5_TOKENS = {
    "t5xxl_ids": lambda seed: torch.randint(0, 32128, (9,), generator=torch.Generator().manual_seed(seed), dtype=torch.int),
    "t5xxl_weights": torch.linspace(0.8, 1.2, 9),
}  # fmt: skip
KREA = {
    "image_model": "krea2", "features": 32, "tdim": 16, "txtdim": 8, "heads": 2, "kvheads": 1, "multiplier": 2, "layers": 6,
    "patch": 2, "channels": 16, "txtlayers": 3, "txtheads": 2, "txtkvheads": 2,
}  # fmt: skip
KREA_REFERENCE = {"reference_latents": [noise(1, 16, 1, 8, 12)], "reference_latents_method": "index_timestep_zero"}
IDEOGRAM = {
    **HEADS, "image_model": "ideogram4", "in_channels": 128, "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 12,
    "mrope_section": [4, 2, 2],
}  # fmt: skip
PADDED = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}
ERNIE = {
    "image_model": "ernie", "hidden_size": 32, "num_attention_heads": 2, "num_layers": 5, "ffn_hidden_size": 64,
    "text_in_dim": 12, "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
BOOGU = {
    "image_model": "boogu", "hidden_size": 32, "num_layers": 4, "num_double_stream_layers": 3, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (4, 6, 6), "instruction_feat_dim": 12,
}  # fmt: skip
COGVIDEO = {
    **HEADS, "image_model": "cogvideox", "in_channels": 16, "patch_size": 2, "time_embed_dim": 32, "text_embed_dim": 12,
    "use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": False,
}  # fmt: skip
PIXEL_DIT = {
    "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 32, "pixel_hidden_size": 8, "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2, "patch_depth": 5, "pixel_depth": 1, "patch_size": 8, "txt_embed_dim": 12, "txt_max_length": 16,
}  # fmt: skip
PID = {
    "image_model": "pid", "lq_latent_channels": 16, "lq_hidden_dim": 16, "lq_num_res_blocks": 1, "patch_depth": 6,
    "pit_lq_inject": True,
}  # fmt: skip
LOW_QUALITY = {"lq_latent": noise(1, 16, 2, 3), "degrade_sigma": torch.tensor([0.1])}
Z_IMAGE_PIXEL = {
    "image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3,
    "dim": 256,  # the host's class accepts no smaller width
    "cap_feat_dim": 12, "n_layers": 5, "n_refiner_layers": 1, "qk_norm": True, "n_heads": 8, "n_kv_heads": 8, "multiple_of": 32,
    "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 1.0,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, "decoder_in_channels": 48,
    "decoder_hidden_size": 32, "decoder_num_res_blocks": 1, "decoder_max_freqs": 8,
}  # fmt: skip
SPLAT = {
    "image_model": "triposplat", "q_token_length": 24, "model_channels": 32, "cond_channels": 12, "num_blocks": 5,
    "num_refiner_blocks": 1, "num_head_channels": 16, "mlp_ratio": 2,
}  # fmt: skip
ACE_15 = {
    "audio_model": "ace1.5", "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
    "num_dit_layers": 6, "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1, "text_hidden_dim": 12,
    "encoder_hidden_size": 32, "encoder_intermediate_size": 64, "encoder_num_heads": 2, "fsq_dim": 32, "sliding_window": 4,
}  # fmt: skip
SONG = {
    "conditioning_lyrics": lambda seed: noise(1, 9, 12, seed=seed + 50),
    "audio_codes": lambda seed: torch.randint(0, 64000, (1, 8), generator=torch.Generator().manual_seed(seed)).tolist(),
}  # fmt: skip
SCAIL = {"model_type": "scail", "in_dim": 20}
REFERENCE = {
    "reference_latents": [noise(1, 16, 1, 8, 12)], "pose_video_latent": noise(1, 16, 2, 4, 6),
    "clip_vision_output": types.SimpleNamespace(penultimate_hidden_states=noise(1, 5, 1280)),
}  # fmt: skip
MASKS = {
    "driving_mask_28ch": noise(1, 2, 28, 4, 6).gt(0).float(), "ref_mask_28ch": noise(1, 3, 28, 8, 12).gt(0).float(),
    "ref_mask_flag": True,
}  # fmt: skip
FAMILIES = {
    "Flux": Family("Flux", FLUX, IMAGE, BOTH, values={"guidance": 3.5}, newer=IDS, branches=(-1, 0, 1, 2)),
    "Flux Schnell": Family("FluxSchnell", {**FLUX, "guidance_embed": False}, IMAGE, BOTH, newer=IDS, branches=(-1, 1)),
    "Flux 2": Family("Flux2", {**FLUX, **FLUX2}, WIDE, BOTH, newer={"txt_ids_dims": [3]}),
    "Chroma": Family("Chroma", CHROMA, IMAGE, BOTH, newer=CHROMA_IDS),
    "Chroma Radiance": Family(
        "ChromaRadiance", {**CHROMA, **RADIANCE}, (1, 3, 48, 64), BOTH,
        newer={**CHROMA_IDS, "use_x0": False, "use_sequential_txt_ids": False},
    ),
    "SD3": Family("SD3", SD3, IMAGE, {"joint_blocks": (0, 1)}),
    "AuraFlow": Family("AuraFlow", AURA, (2, 4, 10, 14), {"double_layers": (0, 1), "single_layers": (0,)}),
    "HunyuanDiT": Family("HunyuanDiT1", HUNYUAN_DIT, (2, 4, 10, 14), ONE, values=T5),
    "HunyuanVideo": Family("HunyuanVideo", HUNYUAN_VIDEO, VIDEO, BOTH, newer={"meanflow_sum": False}, branches=(-1, 0, 2)),
    "Mochi": Family("GenmoMochi", MOCHI, (1, 12, 2, 8, 12), {"blocks": (0, 2)}, text=16, values=MASK),
    "LTXV": Family("LTXV", LTXV, (1, 128, 2, 4, 6), LTX_BLOCKS, values=MASK),
    "Wan": Family("WAN21_T2V", WAN, VIDEO, ONE),
    "Wan VACE": Family("WAN21_Vace", {**WAN, **VACE}, VIDEO, ONE, values={"vace_frames": [noise(1, 32, 2, 8, 12)]}),
    "Wan S2V": Family("WAN22_S2V", {**WAN, **S2V}, VIDEO, ONE, values={"audio_embed": noise(1, 25, 16, 8)}),
    "Wan Animate": Family(
        "WAN22_Animate", {**WAN, **ANIMATE}, VIDEO, ONE, values={"pose_video_latent": noise(1, 16, 1, 8, 12)}
    ),
    "Wan HuMo": Family("WAN21_HuMo", {**WAN, "model_type": "humo", "in_dim": 36}, VIDEO, ONE),
    "Wan Camera": Family("WAN21_Camera", {**WAN, "model_type": "camera", "in_dim": 32}, VIDEO, ONE),
    "Qwen-Image": Family(
        "QwenImage", {**HEADS, **ROPE, "image_model": "qwen_image", "joint_attention_dim": 12}, (1, 16, 1, 8, 12), QWEN_BLOCKS
    ),
    "Hunyuan3D 2": Family(
        "Hunyuan3Dv2", {**SHAPE, "image_model": "hunyuan3d2", "depth_single_blocks": 4}, (2, 64, 20), BOTH
    ),
    "Hunyuan3D 2.1": Family("Hunyuan3Dv2_1", {**SHAPE21, "image_model": "hunyuan3d2_1"}, (2, 64, 20), ONE, branches=(-1, 0, 2)),
    "Stable Audio": Family("StableAudio", AUDIO, (2, 64, 24), {"transformer.layers": (0,)}, text=768, weights=SECONDS),
    "Kandinsky 5": Family("Kandinsky5", KANDINSKY, VIDEO, {"visual_transformer_blocks": (0,)}),
    "LTX audio-video": Family("LTXAV", LTXAV, ((1, 128, 2, 4, 6), (1, 8, 6, 16)), LTX_BLOCKS, text=24, values=MASK),
    "Lens": Family(
        "Lens", {**HEADS, **ROPE, "image_model": "lens", "enc_hidden_dim": 12, "selected_layer_index": (0, 1)}, WIDE,
        QWEN_BLOCKS, text=24,
    ),
    "Mage-Flow": Family(
        "MageFlow", {**HEADS, **ROPE, "image_model": "mage_flow", "joint_attention_dim": 12}, WIDE, QWEN_BLOCKS
    ),
    "JoyImage": Family(
        "JoyImage", {**JOY, "hidden_size": 32, "num_attention_heads": 2}, (1, 16, 1, 8, 12),
        {"double_blocks": ("hidden_states", "encoder_hidden_states")},
    ),
    "SeedVR2": Family(
        "SeedVR2", SEEDVR, VIDEO, {"blocks": ("vid", "txt")}, values={"condition": noise(1, 17, 2, 8, 12)}, branches=(0, 1)
    ),
    "MiniMax H3": Family("MiniMaxH3", MINIMAX, (1, 24, 2, 8, 12), ONE),
    "HiDream-O1": Family("HiDreamO1", HIDREAM, (1, 3, 96, 128), {"language_model.layers": ("x",)}, values=TOKENS),
    "WanDancer": Family("WAN22_WanDancer", {**WAN, **DANCER}, VIDEO, ONE, values={"audio_embed": noise(1, 9, 35)}),
    "Wan Animate 2": Family(
        "WAN_Animate2", {**WAN, "model_type": "animate2", "in_dim": 36}, (1, 16, 3, 8, 12), ONE,
        values={"pose_video_latent": noise(1, 16, 2, 8, 12)}, method="forward_gen",
    ),
    "Lumina 2": Family("Lumina2", LUMINA, IMAGE, {"layers": (0,)}, values=MASK),
    "Z-Image": Family("ZImage", Z_IMAGE, (1, 16, 10, 14), {"layers": (0,)}, values=MASK),
    "PixArt": Family(  # a smaller picture makes the host divide by zero
        "PixArtAlpha", PIXART, (1, 4, 32, 34), ONE, values={"width": 512, "height": 448}
    ),
    "Cosmos": Family("CosmosT2V", COSMOS, VIDEO, ONE, values=MASK, batch=3),
    "Cosmos Predict 2": Family("CosmosT2IPredict2", PREDICT2, (2, 16, 1, 10, 14), ONE),
    "HiDream I1": Family(
        "HiDream", HIDREAM_I1, IMAGE,
        {"double_stream_blocks": ("image_tokens", "text_tokens"), "single_stream_blocks": ("image_tokens",)}, values=LLAMA,
    ),
    "OmniGen 2": Family(
        "Omnigen2", OMNIGEN2, IMAGE, {"layers": (0,)}, values={**MASK, "reference_latents": [noise(1, 16, 6, 8)]}
    ),
    "ACE-Step": Family(
        "ACEStep", ACE, (2, 8, 16, 24), {"transformer_blocks": ("hidden_states",)}, values=LYRICS,
        small=one_lyric_encoder,
    ),
    "Stable Cascade": Family(
        "Stable_Cascade_C", CASCADE, IMAGE, {"down_blocks.1": (0,), "up_blocks.0": (0,)}, branches=(-1, 0, 3)
    ),
    "Stable Cascade B": Family(
        "Stable_Cascade_B", CASCADE_B, (2, 4, 20, 28), {"down_blocks.1": (0,), "up_blocks.0": (0,)}, branches=(-1, 0, 3)
    ),
    "Anima": Family("Anima", ANIMA, (1, 16, 1, 8, 12), ONE, values=T5_TOKENS, small=small_adapter),
    "Krea 2": Family("Krea2", KREA, (1, 16, 1, 8, 12), ONE, text=24, values=KREA_REFERENCE),
    "Ideogram 4": Family("Ideogram4", IDEOGRAM, WIDE, {"layers": (0,)}, values=PADDED),
    "Ernie": Family("ErnieImage", ERNIE, WIDE, {"layers": (0,)}),
    "Boogu": Family(
        "Boogu", BOOGU, IMAGE, {"double_stream_layers": (0, 1), "single_stream_layers": (0,)},
        values={**MASK, "reference_latents": [noise(1, 16, 8, 12)]}, branches=(-1, 0, 2),
    ),
    "CogVideoX": Family("CogVideoX_T2V", COGVIDEO, VIDEO, {"blocks": ("hidden_states", "encoder_hidden_states")}),
    "PixelDiT": Family("PixelDiTT2I", PIXEL_DIT, (1, 3, 48, 64), {"patch_blocks": (0, 1)}, values=MASK),
    "PiD": Family(
        "PiD", {**PIXEL_DIT, **PID}, (1, 3, 64, 96), {"patch_blocks": (0, 1)}, values={**MASK, **LOW_QUALITY}
    ),
    "Z-Image in pixels": Family("ZImagePixelSpace", Z_IMAGE_PIXEL, (1, 3, 32, 40), {"layers": (0,)}, values=MASK),
    "TripoSplat": Family(
        "TripoSplat", SPLAT, ((1, 24, 16), (1, 1, 5)), ONE,
        values={"reference_latents": lambda seed: [noise(1, 128, 2, 2, seed=seed)]},
    ),
    "ACE-Step 1.5": Family("ACEStep15", ACE_15, (1, 64, 40), {"decoder.layers": ("hidden_states",)}, values=SONG),
    "SCAIL": Family("WAN21_SCAIL", {**WAN, **SCAIL}, VIDEO, ONE, values=REFERENCE),
    "SCAIL 2": Family(
        "WAN21_SCAIL2", {**WAN, **SCAIL, "model_type": "scail2"}, VIDEO, ONE, values={**REFERENCE, **MASKS}
    ),
    "MiniMax Music 3": Family(
        # longer than the 689 positions that the network takes at once: it runs its blocks for two windows
        "MiniMaxMusic3", {"audio_model": "minimax_music3"}, (1, 128, 720), {"diffusion_transformer.transformer.layers": (0,)},
        text=8 * 4096, values={"conditioning_scale": torch.ones(1, 1, 1)}, small=small_music,
    ),
    "Wan CausalAR": Family("WAN21_CausalAR_T2V", WAN, VIDEO, ONE),
}  # fmt: skip


def build(name, dtype=torch.float32, computed_in=None, **changes):
    """Return a MODEL of the family with random weights, made of the host's own classes.

    computed_in: the dtype that the host casts the weights to while it samples, None if it does not.
    """
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    if not hasattr(comfy.supported_models, family.config):
        pytest.skip(f"this host has no {family.config}")
    is_newer = hasattr(comfy.supported_models, "Kandinsky5")
    network = {**family.network, **(family.newer if is_newer else {}), **changes}
    config = getattr(comfy.supported_models, family.config)(network)
    config.unet_config.update(network)
    config.set_inference_dtype(dtype, computed_in)
    model = config.get_model(family.weights)
    family.small(model.diffusion_model)
    generator = torch.Generator().manual_seed(1)
    weights = dict(model.diffusion_model.named_parameters())
    of_checkpoint = ("inv_freq", "pos_embed", "beta")  # the buffers that are not constants of the network
    weights.update(pair for pair in model.diffusion_model.named_buffers() if pair[0].endswith(of_checkpoint))
    for key, weight in weights.items():
        scale = max(1, weight[0].numel()) ** -0.5 if weight.dim() > 1 else 0.1
        value = torch.randn(weight.shape, generator=generator) * scale
        weight.copy_(1 + value if weight.dim() == 1 and ("weight" in key or "scale" in key) else value)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def conditioning(name, seed, tokens=7, **values):
    """Return CONDITIONING for the family in the form of its text encoder and stock nodes."""
    family = FAMILIES[name]
    values = {"pooled_output": noise(1, 8, seed=seed + 100), **family.values, **values}
    values = {key: value(seed) if callable(value) else value for key, value in values.items()}
    return [[noise(1, tokens, family.text, seed=seed), values]]


def empty_latent(shape):
    import comfy.nested_tensor

    several = isinstance(shape[0], tuple)
    return {"samples": comfy.nested_tensor.NestedTensor([torch.zeros(one) for one in shape]) if several else torch.zeros(shape)}


def flat(latents):
    """Return one tensor for a sampler's latents; picture and sound are two latents."""
    samples = latents["samples"]
    return torch.cat([one.flatten() for one in samples.unbind()]) if getattr(samples, "is_nested", False) else samples
