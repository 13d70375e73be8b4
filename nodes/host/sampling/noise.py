"""Draw a sampler's noise before the sampler does, so that all iterates of a step use the same noise."""

import itertools

import torch
from comfy.k_diffusion import sampling

# Samplers whose noise is a Brownian path. The host computes it on the CPU unless the name ends in _gpu.
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")


def sampler_name(function):
    """Return the name that a sampler function has in the host's list."""
    return getattr(function, "__name__", "").removeprefix("sample_")


def is_of_the_host(function):
    """Return whether a sampler function is the host's own code, which does nothing but sampling.

    A wrapper of another pack does not count, although functools.wraps gives it the name and module of the host's function.
    """
    while _defined_in(function) == "torch.utils._contextlib":  # the wrapper of torch.no_grad
        function = function.__wrapped__
    return _defined_in(function).split(".")[0] in ("comfy", "comfy_extras")


def _defined_in(function):
    return getattr(function, "__globals__", {}).get("__name__", "")


def can_draw_ahead(function, options):
    """Return whether this is a sampler function of the host that makes its own noise sampler."""
    name = getattr(function, "__name__", "")
    return getattr(sampling, name, None) is function and options.get("noise_sampler") is None


class NoiseAhead:
    """Draws the noise that a sampler function of the host will draw.

    A Brownian path returns the same noise each time; `options` passes it to the sampler function too. Other samplers draw from
    a generator with the run's seed. Twins of this generator draw the same numbers in the same order.
    """

    def __init__(self, function, x, sigmas, seed):
        self._x = x  # for device and dtype: a Brownian path returns noise on the device of the sigmas
        self._seed = seed
        self._twins = []
        self._path = None
        name = sampler_name(function)
        if name.removesuffix("_gpu") in BROWNIAN:
            lowest, highest = sigmas[sigmas > 0].min(), sigmas.max()
            self._path = sampling.BrownianTreeNoiseSampler(x, lowest, highest, seed=seed, cpu=not name.endswith("_gpu"))
        self.options = {} if self._path is None else {"noise_sampler": self._path}

    def of(self, draws):
        """Return a function for the noise term of a step: the sum of its draws times their factors.

        Every call of the function returns the same noise. Steps must come in order.
        """
        askings = itertools.count()

        def noise():
            total, asking = None, next(askings)
            for draw in draws:
                drawn = self._draw(draw, asking)
                total = drawn * draw.factor if total is None else torch.add(total, drawn, alpha=draw.factor)
            return total

        return noise

    def _draw(self, draw, asking):
        if self._path is not None:
            return _without_waiting(self._path(draw.sigma, draw.sigma_next), self._x)
        if asking == len(self._twins):  # each repeated call needs its own twin, since a generator cannot go back
            self._twins.append(_Twin(self._x, self._seed))
        return self._twins[asking].draw(draw)


class _Twin:
    def __init__(self, x, seed):
        self._sample = sampling.default_noise_sampler(x, seed=seed)
        self._drawn = 0

    def draw(self, draw):
        while self._drawn < draw.number:
            self._sample(draw.sigma, draw.sigma_next)
            self._drawn += 1
        self._drawn += 1
        return self._sample(draw.sigma, draw.sigma_next)


def _without_waiting(noise, x):
    """Move noise to the device and dtype of x. Pinned memory is used because a copy from pageable memory blocks the CPU."""
    noise = noise.to(x.dtype)
    if x.device.type == "cuda" and noise.device.type == "cpu":
        noise = noise.pin_memory()
    return noise.to(x.device, non_blocking=True)
