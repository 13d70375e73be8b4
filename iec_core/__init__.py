"""Iterative Error Correction (IEC, arXiv 2511.06250), caches and quantization for diffusion models, in torch.

`iec_step` is the paper's method. In a DDIM loop of diffusers it replaces `scheduler.step`:

    >>> import torch
    >>> from diffusers import DDIMScheduler, UNet2DModel
    >>> from iec_core import iec_step, relative_error
    >>> blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [32]}
    >>> unet = UNet2DModel(sample_size=8, layers_per_block=1, **blocks).eval()
    >>> scheduler = DDIMScheduler(clip_sample=False)
    >>> scheduler.set_timesteps(10)
    >>> def sample(x, iterations):
    ...     for t in scheduler.timesteps:
    ...         before, next_t = scheduler.alphas_cumprod[t], t - 100  # 1000 timesteps in 10 steps
    ...         after = scheduler.alphas_cumprod[next_t] if next_t >= 0 else scheduler.final_alpha_cumprod
    ...         a = (after / before) ** 0.5
    ...         b = (1 - after) ** 0.5 - a * (1 - before) ** 0.5
    ...         x = iec_step(lambda x: unet(x, t).sample, x, a, b, lambda_=0.5, iterations=iterations)
    ...     return x
    >>> with torch.no_grad():
    ...     x = torch.randn(2, 3, 8, 8)
    ...     plain, corrected = sample(x, 0), sample(x, 1)
    >>> relative_error(corrected, plain).shape
    torch.Size([2])

`corrected_denoised` is the general form, for every sampler whose step is affine in the denoised prediction. The folders
`correction`, `caching` and `quantization` hold the methods. Next to them are the modules that they share, such as `metrics`
with the error measures, `run_report` with the record of a run, `profile_file` with the file of a calibration, and `errors`.
Besides torch, calibration files need safetensors, and the choice of mixed precision needs numpy. Importing the package imports
no kernels and no Triton.
"""

from .caching.feature_cache import FeatureCache, parse_cache_schedule
from .correction.contraction import Linearization, spectral_norms
from .correction.iteration import CorrectionSettings, Step, StepTrace, corrected_denoised, iec_step
from .errors import IECError
from .metrics import relative_error
from .quantization.gptq import Moments, calibrated_weight
from .quantization.packing import Packing, WeightFormat

__all__ = [
    "CorrectionSettings",
    "FeatureCache",
    "IECError",
    "Linearization",
    "Moments",
    "Packing",
    "Step",
    "StepTrace",
    "WeightFormat",
    "calibrated_weight",
    "corrected_denoised",
    "iec_step",
    "parse_cache_schedule",
    "relative_error",
    "spectral_norms",
]
