"""The controls of the experiments: each effect of a correction by itself.

A correction with lambda 1/2 averages two evaluations, whose quantization errors differ. The second evaluation is also at
another, less noisy point, which shrinks the predicted noise. Here the average comes without the other point (`Rounding`,
`evaluated`), and the shrinking without a second evaluation (`shrunk`). The host has a constant shrinking as a node, Epsilon
Scaling.
"""

import contextlib

import torch


class StochasticRounding(torch.overrides.TorchFunctionMode):
    """A context in which round_ rounds up with the probability of the fraction.

    This is rounding without bias (Gupta et al. 2015, arXiv 1502.02551); the error is drawn again each time.
    """

    def __init__(self, seed):
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.round_:
            return args[0].add_(torch.rand(args[0].shape, generator=self._generator)).floor_()
        return function(*args, **(kwargs or {}))


class Rounding:
    """Stochastic rounding of the weights and activations of a quantized MODEL, drawn again in each evaluation of the network.

    The weights come from the full-precision MODEL of the same network.
    """

    def __init__(self, model, full, seed):
        self._mode = StochasticRounding(seed)
        weights = dict(full.model.diffusion_model.named_parameters())
        modules = model.model.diffusion_model.named_modules()
        self._layers = [(layer, weights[f"{name}.weight"]) for name, layer in modules if hasattr(layer, "packing")]

    @contextlib.contextmanager
    def evaluation(self):
        """Return a context in which the weights and all activations are rounded with a new draw."""
        with self._mode:
            self.round_weights()
            yield

    def round_weights(self):
        """Round the weights again by the active rounding; outside of `evaluation`, to the nearest as before."""
        for layer, weight in self._layers:
            layer.weight.data.copy_(layer.packing.quantize(weight.data))


def evaluated(model, evaluations, rounding):
    """Return a clone of a MODEL whose network output is the mean of this many evaluations at the same point, each in
    `rounding.evaluation()` if there is a rounding.
    """
    from comfy.patcher_extension import WrappersMP

    def wrapped(executor, *args, **kwargs):
        outputs = []
        for _ in range(evaluations):
            with rounding.evaluation() if rounding else contextlib.nullcontext():
                outputs.append(executor(*args, **kwargs))
        return sum(outputs) / evaluations

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "effects", wrapped)
    return model


def shrink_factor(sigma, sigma_next, lambda_):
    """Return the factor by which a correction at the paper's point shrinks the predicted noise where noise dominates.

    It is 1 - lambda (1 - r) with r = sqrt((1 - abar') / (1 - abar)), the noise in x' relative to that in x, and abar = 1 / (1 +
    sigma^2).
    """
    return 1 - lambda_ * (1 - sigma_next / sigma * ((1 + sigma**2) / (1 + sigma_next**2)) ** 0.5)


def shrunk(model, lambda_):
    """Return a clone of a MODEL whose guided noise prediction is multiplied by `shrink_factor` of its step.

    It applies to every step of a sampler with one evaluation per step.
    """

    def shrink(args):
        x, denoised, sigma = args["input"], args["denoised"], args["sigma"].max().item()
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"].tolist()
        step = min(range(len(sigmas) - 1), key=lambda i: abs(sigmas[i] - sigma))
        return x - (x - denoised) * shrink_factor(sigmas[step], sigmas[step + 1], lambda_)

    model = model.clone()
    model.set_model_sampler_post_cfg_function(shrink)
    return model
