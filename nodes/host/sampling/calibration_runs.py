"""The sampling runs of a calibration, on the user's prompts."""

import contextlib
import contextvars
from dataclasses import dataclass, replace

import comfy.sample
import comfy.utils
from comfy.patcher_extension import WrappersMP

from ....iec_core.advice import TRY_PRECISION
from .run_plan import follow_run

_has_bars = contextvars.ContextVar("has_bars", default=True)


@contextlib.contextmanager
def no_bars():
    """Show no Bar that is made in this context, because the node shows another one."""
    token = _has_bars.set(False)
    try:
        yield
    finally:
        _has_bars.reset(token)


class Bar:
    """The node's progress bar, over the steps of all runs and any other work. It is a callback for the host's samplers."""

    def __init__(self, total):
        self._bar = comfy.utils.ProgressBar(total) if _has_bars.get() else None

    def __call__(self, step, denoised, x, total_steps):
        self.advance()

    def advance(self):
        if self._bar is not None:
            self._bar.update(1)


def open_to_hooks(model):
    """Return a clone of a MODEL in which hooks on layers work.

    The clone has no torch.compile of the host, because a compiled network does not call hooks that layers get later. It also
    has no copies of the network on other GPUs, because their layers have no hooks.
    """
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")
    model.remove_additional_models("multigpu")
    return model


def watched(model, watch):
    """Return a clone of a MODEL, made by `open_to_hooks`, whose layers have hooks during each evaluation of its network.

    watch(transformer_options): registers the hooks for an evaluation, and returns them in a list.
    """

    def apply_model(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        hooks = watch(transformer_options)
        try:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    model = open_to_hooks(model)
    follow_run(model)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "iec_watched", apply_model)
    return model


@dataclass(frozen=True)
class Runs:
    """The sampling runs of a calibration: `count` runs for each prompt (CONDITIONING), with different noise.

    sampling: {steps, cfg, sampler_name, scheduler} as for the host's KSampler.
    """

    prompts: list
    negative: list
    latent_image: dict
    seed: int
    count: int
    sampling: dict

    @property
    def steps(self):
        """The number of steps of all runs together."""
        return self.count * len(self.prompts) * self.sampling["steps"]

    @property
    def first(self):
        """Runs that consist of the first run alone."""
        return replace(self, prompts=self.prompts[:1], count=1)

    def with_sampling(self, **changes):
        """Return these Runs with other values in `sampling`."""
        return replace(self, sampling={**self.sampling, **changes})

    def sample(self, callback, model):
        """Run the model. Raises ValueError if the result of a run is not finite."""
        for prompt in self.prompts:
            for run in range(self.count):
                _check_finite(self._sample(model, prompt, run, self.sampling, callback))

    def one(self, run, steps, sampler_name, scheduler, model):
        """Return the latents of one run, whose prompt is the next one in turn and whose seed is the next one."""
        sampling = {**self.sampling, "steps": steps, "sampler_name": sampler_name, "scheduler": scheduler}
        return self._sample(model, self.prompts[run % len(self.prompts)], run, sampling, None)

    def _sample(self, model, prompt, run, sampling, callback):
        ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # in the empty latents of newer hosts
        ratios = {name: self.latent_image[name] for name in ratios if name in self.latent_image}
        latent = comfy.sample.fix_empty_latent_channels(model, self.latent_image["samples"], **ratios)
        seed = (self.seed + run) % 2**64
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(
            model, noise, positive=prompt, negative=self.negative, latent_image=latent, seed=seed, callback=callback,
            disable_pbar=True, **sampling,
        )  # fmt: skip


def _check_finite(samples):
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]
    if not all(part.isfinite().all() for part in parts):
        raise ValueError(
            f"model: it returned NaN or infinity in a calibration run, so nothing can be calibrated. {TRY_PRECISION}"
        )
