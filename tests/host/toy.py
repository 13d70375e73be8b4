"""A network that is a line, under the host's own samplers and parameterizations, in float64: its fixed points are known."""

import types

import torch

SLOPE, OFFSET = 0.35, 0.2


class LinearGuider:
    """Stands where the host's guider does: model(x, sigma) is the denoised prediction of the network SLOPE * x + OFFSET in
    the host's own parameterization. `calls` takes (x, sigma, iteration) of every evaluation.
    """

    def __init__(self, model_type, settings=None, slope=SLOPE):
        import comfy.model_base

        config = types.SimpleNamespace(sampling_settings=settings or {})
        sampling = comfy.model_base.model_sampling(config, comfy.model_base.ModelType[model_type])
        self.inner_model = types.SimpleNamespace(model_sampling=sampling, scale_latent_inpaint=self._no_inpaint)
        self.model_patcher = types.SimpleNamespace(
            get_model_object=lambda name: getattr(self.inner_model, name), model=self.inner_model
        )
        self.cfg = 1.0
        self.slope = slope
        self.calls = []

    def _no_inpaint(self, **_):
        raise AssertionError("no mask was given")

    def denoised(self, x, sigma):
        """The denoised prediction at x, for sigma [B]."""
        sampling = self.inner_model.model_sampling
        output = self.slope * sampling.calculate_input(sigma, x) + OFFSET
        return sampling.calculate_denoised(sigma, output, x)

    def line(self, sigma):
        """(p, q) with denoised(x) = p x + q at this sigma (a float)."""
        at = torch.tensor([sigma], dtype=torch.float64)
        zero, one = (self.denoised(torch.full((1, 1), value, dtype=torch.float64), at).item() for value in (0.0, 1.0))
        return one - zero, zero

    def __call__(self, x, sigma, model_options=None, seed=None):
        told = (model_options or {}).get("transformer_options", {}).get("iec", {})
        self.calls.append((x.clone(), sigma[0].item(), told.get("iteration")))
        return self.denoised(x, sigma)


def run(sampler, guider, sigmas, seed=3, shape=(2, 1, 2, 2), callback=None):
    """Run a SAMPLER of the host over `sigmas`, from noise; returns the final latent."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    extra = {"model_options": {}, "seed": seed}
    return sampler.sample(guider, sigmas, extra, callback, noise, torch.zeros_like(noise), None, True)
