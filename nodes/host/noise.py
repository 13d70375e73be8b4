"""A sampler's noise, known before the sampler draws it, so that one draw serves every iterate of a step."""

import torch
from comfy.k_diffusion import sampling

# Samplers whose noise is a Brownian path; the host keeps it on the CPU unless the name ends in _gpu.
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")


def sampler_name(function):
    """Return a sampler function's name as the host's list has it."""
    return getattr(function, "__name__", "").removeprefix("sample_")


def can_draw_ahead(function, options):
    """Tell whether this is a sampler of the host that makes its own noise sampler."""
    name = getattr(function, "__name__", "")
    return getattr(sampling, name, None) is function and options.get("noise_sampler") is None


class NoiseAhead:
    """Draws the noise that a host sampler function is going to draw.

    A Brownian path gives the same noise each time that it is asked: `options` has it for the sampler function too. The other
    samplers draw from a generator with the run's seed; a twin of it draws the same numbers, in the same order.
    """

    def __init__(self, function, x, sigmas, seed):
        self._place = {"device": x.device, "dtype": x.dtype}  # a Brownian path answers on the device of the sigmas
        name = sampler_name(function)
        self._is_path = name.removesuffix("_gpu") in BROWNIAN
        self._drawn = 0
        if self._is_path:
            lowest, highest = sigmas[sigmas > 0].min(), sigmas.max()
            self._sample = sampling.BrownianTreeNoiseSampler(x, lowest, highest, seed=seed, cpu=not name.endswith("_gpu"))
        else:
            self._sample = sampling.default_noise_sampler(x, seed=seed)
        self.options = {"noise_sampler": self._sample} if self._is_path else {}

    def of(self, draws):
        """Return the noise term of a step, the sum of its draws times their factors. Steps come in order."""
        total = None
        for draw in draws:
            if not self._is_path:
                while self._drawn < draw.number:
                    self._sample(draw.sigma, draw.sigma_next)
                    self._drawn += 1
            noise = self._sample(draw.sigma, draw.sigma_next).to(**self._place)
            self._drawn += 1
            total = noise * draw.factor if total is None else torch.add(total, noise, alpha=draw.factor)
        return total
