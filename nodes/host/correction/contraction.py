"""The Jacobian of a MODEL's network along a sampling run: whether steps amplify errors, and whether corrections contract.

The coordinates are those of the network's own input, as in the paper: u = c_in(sigma) x for the host's latent x. With the
host's denoised prediction D, the step u' = A u + B e(u) has

    e(u) = (u / c - D(u / c, sigma)) / sigma,        A = c' / c,        B = c' (sigma' - sigma),

for c = c_in(sigma) and c' = c_in(sigma'). A correction evaluates e at u', with the step's own sigma. docs/contraction.md has
the derivation. D is the prediction that a sampler of the host gets, with guidance, in-paint mask and all patches.
"""

import contextlib
import itertools

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sample
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch.overrides import TorchFunctionMode

from ....iec_core.advice import TRY_PRECISION
from ....iec_core.correction.contraction import (
    LAMBDAS,
    Linearization,
    iteration_pair,
    lipschitz,
    random_direction,
    spectral_norms,
    step_pair,
    suggested_lambda,
)  # fmt: skip
from ....iec_core.correction.contraction_report import ContractionReport, StepContraction
from ....iec_core.log import logger
from ..caching.cache_run import expected_of_run
from ..quantization.quantize import quantization_of
from ..quantization.quantized_layers import straight_through
from ..sampling.calibration_runs import Bar
from ..sampling.network_calls import IEC
from ..sampling.rehearsal import input_scale


class NormalTensors(TorchFunctionMode):
    """A mode that replaces tensors made in inference mode by copies that autograd can use.

    A model that the host's executor has loaded consists of such tensors. The copies are kept until the mode ends.
    """

    def __init__(self):
        super().__init__()
        self._copies = {}  # {id: (tensor, its copy)}; the tensor is kept so that its id is not used again

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("__get__", "__set__"):
            return function(*args, **(kwargs or {}))
        return function(
            *(self._normal(one) for one in args), **{name: self._normal(one) for name, one in (kwargs or {}).items()}
        )

    def __exit__(self, *error):
        self._copies.clear()
        return super().__exit__(*error)

    def _normal(self, value):
        if isinstance(value, torch.Tensor) and value.is_inference():
            if id(value) not in self._copies:
                self._copies[id(value)] = value, value.detach().clone()
            return self._copies[id(value)][1]
        if type(value) in (list, tuple):
            return type(value)(self._normal(one) for one in value)
        return value


def _attention(function, *args, **kwargs):
    """Compute the host's basic attention, which has derivatives. The others have none, or overwrite their inputs."""
    return comfy.ldm.modules.attention.attention_basic(*args, **kwargs)


@contextlib.contextmanager
def _with_derivatives():
    """Let the host use only operations that have derivatives, as in training. Older hosts have no other operations."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    try:
        if before is not None:
            management.in_training = True
        yield
    finally:
        if before is not None:
            management.in_training = before


class Probe:
    """An Euler sampler function for the host that measures every n-th step before taking it. report: a ContractionReport."""

    def __init__(self, report, every, iterations, tolerance, perturbation, seed):
        self.report = report
        self._every, self._iterations, self._tolerance, self._perturbation = every, iterations, tolerance, perturbation
        self._seed = seed
        self._method = None

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        schedule = sigmas.tolist()
        if expected_of_run(extra_args, schedule) is not None:
            raise ValueError(
                "model: a cache is on this MODEL, so an evaluation depends on earlier ones and has no Jacobian; connect the "
                "MODEL without the cache."
            )
        network = model.inner_model.inner_model.diffusion_model
        for step, (sigma, sigma_next) in enumerate(itertools.pairwise(schedule)):
            denoised = model(x, sigmas[step].expand(x.shape[0]), **extra_args)
            slope = (x - denoised) / sigma
            if step % self._every == 0:
                self.report.steps.append(self._measured(model, network, x, slope, step, sigma, sigma_next, extra_args))
            x = x + (sigma_next - sigma) * slope
            if not bool(x.isfinite().all()):
                raise ValueError(_not_finite(step, len(schedule) - 1))
            if callback is not None:
                callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
        self.report.finish(len(schedule) - 1)
        return x

    def _measured(self, model, network, x, slope, step, sigma, sigma_next, extra_args):
        """Return the StepContraction of a step that begins at x. slope: (x - D) / sigma at x."""
        sampling = model.inner_model.inner_model.model_sampling
        here, there = input_scale(sampling, sigma), input_scale(sampling, sigma_next)
        a, b = there / here, there * (sigma_next - sigma)
        with torch.inference_mode(False), NormalTensors(), _with_derivatives():
            x, slope = x.clone(), slope.clone()

            def noise(u):
                at = torch.full((u.shape[0],), sigma, dtype=x.dtype, device=x.device)
                latent = u / here
                return (latent - model(latent, at, **_copied(extra_args))) / sigma

            u, pairs = here * x, [iteration_pair(lambda_, b) for lambda_ in LAMBDAS]
            try:
                growth = self._norms(network, noise, u, [step_pair(a, b)], slope, step)
                u_next = a * u + b * slope
                with torch.no_grad():
                    slope_next = noise(u_next)
                contraction = self._norms(network, noise, u_next, pairs, slope_next, step)
            except ValueError as error:
                raise ValueError(
                    f"model: the Jacobian of its network cannot be measured in step {step} ({error}). {TRY_PRECISION}"
                ) from error
        suggested = suggested_lambda(contraction[0].norms)
        return StepContraction.of(
            step, sigma, sigma_next, a, b, LAMBDAS, suggested, growth, contraction, growth[0].products + contraction[0].products
        )

    def _norms(self, network, noise, u, pairs, value, step):
        """Return (SpectralNorms, true network's Lipschitz estimates [P, B]) of alpha I + beta J for the P pairs; J is at u."""
        generator = torch.Generator().manual_seed((self._seed + step) % 2**63)
        with straight_through(network), Linearization(noise, u, self._method) as jacobian:
            self._method = jacobian.method  # checked once: whether this method is possible and right
            found = spectral_norms(jacobian, u, pairs, self._iterations, self._tolerance, generator)
        self.report.method = self._method
        with torch.no_grad():
            least = int(found.norms.amax(1).argmin())
            directions = [found.vectors[least], random_direction(u, generator)]
            return found, lipschitz(noise, u, directions, [self._perturbation], pairs, value)


def _copied(extra_args):
    """Return a sampler's extra arguments with copied options, because the host writes into the transformer options."""
    options = dict(extra_args.get("model_options", {}))
    options["transformer_options"] = dict(options.get("transformer_options", {}))
    return {**extra_args, "model_options": options}


def _not_finite(step, total):
    return (
        f"model: in step {step} of {total}, numbered from 0, the network returned NaN or infinity, so nothing can be measured. "
        f"{TRY_PRECISION}"
    )


def probe_contraction(model, positive, negative, latent_image, seed, sampling, every, iterations, tolerance, perturbation):
    """Return the ContractionReport of an Euler run of a MODEL.

    latent_image: LATENT. sampling: {steps, cfg, scheduler, denoise} as for the host's KSampler. every: measure every n-th step,
    from the first. iterations, tolerance: of `spectral_norms`. perturbation: size of the perturbations that measure the true
    map, as a share of the latent's norm. Raises ValueError if the MODEL cannot be measured.
    """
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, IEC):
        raise ValueError(
            "model: IEC is on this MODEL already, but the probe measures a model without it; connect the MODEL that goes into "
            "Apply IEC (model)."
        )
    if getattr(latent_image["samples"], "is_nested", False):
        raise ValueError("latent_image: it consists of several latents, which the probe cannot measure; choose another model.")
    report = ContractionReport(quantization_of(model) or "not quantized")
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")  # a compiled network has no forward mode
    options = model.model_options["transformer_options"] = {**model.model_options.get("transformer_options", {})}
    options["optimized_attention_override"] = _attention
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # in the empty latents of newer hosts
    ratios = {name: latent_image[name] for name in ratios if name in latent_image}
    latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **ratios)
    noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
    steps, scheduler, denoise = sampling["steps"], sampling["scheduler"], sampling["denoise"]
    sigmas = comfy.samplers.KSampler(model, steps, model.load_device, "euler", scheduler, denoise).sigmas
    if len(sigmas) < 2:
        raise ValueError(f"denoise: at {denoise} no step is left to measure; choose a larger value.")
    probe = Probe(report, every, iterations, tolerance, perturbation, seed)
    bar = Bar(len(sigmas) - 1)
    comfy.sample.sample_custom(
        model, noise, sampling["cfg"], comfy.samplers.KSAMPLER(probe), sigmas, positive, negative, latent,
        noise_mask=latent_image.get("noise_mask"), callback=bar, disable_pbar=True, seed=seed,
    )  # fmt: skip
    if any(not step.converged for step in report.steps):
        logger.warning(f"contraction probe: {report.not_converged()}")
    return report
