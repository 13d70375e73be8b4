"""The paper's correction written out as a sampler function of the host, with nothing of the pack: what its nodes must give."""

import itertools


def iec_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler over a variance-preserving model, every step corrected once at its own timestep with lambda 0.5.

    The network is shown the step's result at the input scale 1 / sqrt(sigma^2 + 1) that the result belongs to, and the sigma
    that the step begins at. Outside an in-paint mask the step is Euler's.
    """
    mask, change = extra_args["denoise_mask"], extra_args["model_options"].get("denoise_mask_function")
    for sigma, sigma_next in itertools.pairwise(sigmas):
        at = sigma.expand(x.shape[0])
        plain = x + (sigma_next - sigma) * (x - model(x, at, **extra_args)) / sigma
        shown = plain * ((sigma**2 + 1) / (sigma_next**2 + 1)).sqrt()
        again = x + (sigma_next - sigma) * (shown - model(shown, at, **extra_args)) / sigma
        inside = 1.0 if mask is None else mask
        if change is not None and mask is not None:
            inside = change(at, mask, extra_options={"model": model.inner_model, "sigmas": sigmas})
        x = plain + inside * 0.5 * (again - plain)
    return x
