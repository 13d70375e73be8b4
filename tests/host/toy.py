"""A network of one formula, run by the host's own samplers and parameterizations, in float64."""

import functools
import types

import torch

SLOPE, OFFSET = 0.35, 0.2


@functools.cache
def _model_sampling(model_type, **settings):
    """Return the host's own parameterization (kept, because Stable Cascade's takes half a second to make)."""
    import comfy.model_base

    config = types.SimpleNamespace(sampling_settings=settings)
    return comfy.model_base.model_sampling(config, comfy.model_base.ModelType[model_type])


class ToyGuider:
    """Replace the host's guider: model(x, sigma) is the denoised prediction of `network` in the host's own parameterization.

    The default network is linear, and its fixed points are known. `calls` gets (x, sigma, iteration) of every evaluation.
    """

    def __init__(self, model_type, settings=None, network=lambda x: SLOPE * x + OFFSET):
        self.inner_model = types.SimpleNamespace(model_sampling=_model_sampling(model_type, **(settings or {})))
        self.model_patcher = types.SimpleNamespace(
            get_model_object=lambda name: getattr(self.inner_model, name), model=self.inner_model
        )
        self.cfg = 1.0
        self.network = network
        self.calls = []

    def denoised(self, x, sigma):
        """Return the denoised prediction at x, for sigma [B]."""
        sampling = self.inner_model.model_sampling
        return sampling.calculate_denoised(sigma, self.network(sampling.calculate_input(sigma, x)), x)

    def line(self, sigma):
        """Return (p, q) with denoised(x) = p x + q at this sigma (a float)."""
        at = torch.tensor([sigma], dtype=torch.float64)
        zero, one = (self.denoised(torch.full((1, 1), value, dtype=torch.float64), at).item() for value in (0.0, 1.0))
        return one - zero, zero

    def input_scale(self, sigma):
        """Return the host's c_in at this sigma (a float)."""
        at, one = torch.tensor([sigma], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return self.inner_model.model_sampling.calculate_input(at, one).item()

    def __call__(self, x, sigma, model_options=None, seed=None):
        told = (model_options or {}).get("transformer_options", {}).get("iec", {})
        self.calls.append((x.clone(), sigma[0].item(), told.get("iteration")))
        return self.denoised(x, sigma)


class Listener(ToyGuider):
    """Record in `told` the options that each evaluation gets, and its actual sigma: (step, iteration, sigma, actual
    sigma).
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.told = []

    def __call__(self, x, sigma, model_options=None, seed=None):
        about = model_options["transformer_options"]["iec"]
        self.told.append((about["step"], about["iteration"], about["sigma"], sigma[0].item()))
        return super().__call__(x, sigma, model_options, seed)


class PixelVAE:
    """A VAE that decodes like the host's pixel-space VAE."""

    def decode(self, samples):
        return (samples.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


def run(sampler, guider, sigmas, seed=3, shape=(2, 1, 2, 2), callback=None, dtype=torch.float64):
    """Run a SAMPLER of the host over `sigmas`, from noise; returns the final latent."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(sigmas.device)
    extra = {"model_options": {}, "seed": seed}
    return sampler.sample(guider, sigmas.to(dtype), extra, callback, noise, torch.zeros_like(noise), None, True)
