"""Expected results of the nodes, without any code of the pack.

They are the paper's correction as a sampler function of the host, and the value to which a feature is extrapolated.
"""

import itertools

import torch


def iec_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Run Euler over a variance-preserving model, every step corrected once at its own timestep with lambda 0.5.

    The network gets the step's result at the result's own input scale 1 / sqrt(sigma^2 + 1), and the sigma at which the step
    begins. Outside an in-paint mask the step is Euler's, and the network gets the image with the noise of sigma_next there, as
    everywhere.
    """
    mask, change = extra_args["denoise_mask"], extra_args["model_options"].get("denoise_mask_function")
    for sigma, sigma_next in itertools.pairwise(sigmas):
        at = sigma.expand(x.shape[0])
        plain = x + (sigma_next - sigma) * (x - model(x, at, **extra_args)) / sigma
        to_shown = ((sigma**2 + 1) / (sigma_next**2 + 1)).sqrt()
        result, inside = plain, 1.0 if mask is None else mask
        if change is not None and mask is not None:
            inside = change(at, mask, extra_options={"model": model.inner_model, "sigmas": sigmas})
        if mask is not None:
            result = inside * plain + (1 - inside) * (model.latent_image + sigma_next * model.noise)
        denoised = model(result * to_shown, at, **{**extra_args, "denoise_mask": None})
        if mask is not None:
            denoised = inside * denoised + (1 - inside) * model.latent_image
        again = x + (sigma_next - sigma) * (plain * to_shown - denoised) / sigma
        x = plain + inside * 0.5 * (again - plain)
    return x


def carried_forward(features, step, degree):
    """Evaluate Lagrange's polynomial through the last degree + 1 of the (step, feature) at `step`; use `as_tried` if degree is
    None.
    """
    if degree is None:
        return as_tried(features, step)
    nodes, total = features[-degree - 1 :], 0
    for i, (here, feature) in enumerate(nodes):
        weight = 1.0
        for j, (there, _) in enumerate(nodes):
            weight *= (step - there) / (here - there) if i != j else 1
        total = total + weight * feature
    return total


def as_tried(features, step):
    """Extrapolate each row between the held feature and the straight line through the last two features, at `step`.

    The share of the way is the one that would have fitted the previous features best. A trial counts half as much as the next
    trial, and before the first trial the share is a quarter.
    """
    if len(features) == 1:
        return features[0][1]
    shares = []
    for row in range(len(features[0][1])):
        met = moved = 0.0
        for (p, f), (q, g), (r, true) in zip(features, features[1:], features[2:]):
            move = (g - f)[row].double() * (r - q) / (q - p)
            met, moved = met / 2 + (move * (true - g)[row]).sum(), moved / 2 + (move * move).sum()
        shares.append(0.25 if len(features) == 2 else max(0.0, min(1.0, met / moved)))
    held, line = features[-1][1], carried_forward(features, step, 1)
    return torch.stack([h + share * (at - h) for h, at, share in zip(held, line, shares)])
