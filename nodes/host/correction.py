"""IEC in the host's sampling loop: one hook, `with_correction`, serves every node.

A sampler function of the host gets a callable `model(x, sigma, **extra_args)` that returns the denoised latent, with
guidance and the in-paint mask applied. That callable is what is corrected.
"""

import copy
import functools
import math
import time

import comfy.patcher_extension
import comfy.samplers
import torch

from ...iec_core.correction import corrected_denoised
from . import events

KEY = "iec"


class CorrectedDenoiser:
    """Stands before a sampler function in place of the host's denoiser, and corrects the steps that `settings` name.

    A step is corrected where the sampler evaluates at the step's own sigma; evaluations between two sigmas of the
    schedule pass through. Unknown attributes are the host denoiser's, which samplers read.
    """

    def __init__(self, model, sigmas, settings, report):
        self._model = model
        self._schedule = sigmas.tolist()
        self._corrected = settings.corrected_steps(self._schedule)
        self._settings = settings
        self._report = report
        self._progress = events.ProgressEvents(report, len(self._schedule) - 1)

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **extra_args):
        step = self._step_at(float(sigma.flatten()[0]))
        if step is not None:
            self._begin(step, x)
        if step not in self._corrected:
            self._report.nfe += 1
            return self._model(x, sigma, **extra_args)

        predictions = []

        def evaluate(x_in, sigma, iteration):
            self._report.nfe += 1
            told = _tell(extra_args, {"step": step, "iteration": iteration})
            predictions.append(self._model(x_in, sigma, **told))
            return predictions[-1]

        sigma_next = sigma.new_tensor(self._schedule[step + 1])
        scale = self._input_scale(sigma_next) / self._input_scale(sigma.flatten()[0])
        corrected = corrected_denoised(evaluate, x, sigma, sigma_next, scale, self._settings)
        return self._outside_mask(predictions[0], corrected, sigma, extra_args)

    def _outside_mask(self, first, corrected, sigma, extra_args):
        """Keep the uncorrected prediction outside the in-paint mask: there it is the image to keep, and not the network's."""
        mask = extra_args.get("denoise_mask")
        if mask is None:
            return corrected
        change = extra_args.get("model_options", {}).get("denoise_mask_function")
        if change is not None:  # as in the host's KSamplerX0Inpaint
            options = {"model": self._model.inner_model, "sigmas": self._model.sigmas}
            mask = change(sigma, mask, extra_options=options)
        return torch.lerp(first, corrected, mask.to(corrected).expand_as(corrected))

    def finish(self, samples):
        """Take down the run's final latent."""
        self._begin(len(self._schedule) - 1, samples)

    def _begin(self, step, x):
        self._report.keep(step, x)
        self._progress.step(step)

    def _step_at(self, sigma):
        """Return the number of the step that starts at this sigma, or None."""
        for step, start in enumerate(self._schedule[:-1]):
            if math.isclose(sigma, start, rel_tol=1e-6):
                return step
        return None

    def _input_scale(self, sigma):
        """Return the host's c_in(sigma) as a scalar tensor, whatever the model's parameterization."""
        sampling = self._model.inner_model.inner_model.model_sampling
        return sampling.calculate_input(sigma.reshape(1), torch.ones_like(sigma).reshape(1))[0]


def _tell(extra_args, iec):
    """Return the sampler's extra arguments with `iec` in the transformer options, for whatever else is on the MODEL."""
    model_options = dict(extra_args.get("model_options", {}))
    model_options["transformer_options"] = {**model_options.get("transformer_options", {}), KEY: iec}
    return {**extra_args, "model_options": model_options}


def check_sampler(name, settings):
    """Raise ValueError for a sampler, by its name in the host's list, that cannot be corrected as `settings` say."""
    if "cfg_pp" in name and settings.steps.kind != "none" and settings.max_iterations:
        raise ValueError(
            f"sampler: {name} steps with the unguided prediction of its last evaluation, which a correction moves "
            "elsewhere; choose a sampler without cfg_pp, or correction_steps none."
        )


def with_correction(sampler, settings, report):
    """Return a copy of a host SAMPLER whose steps are corrected; `report` (a RunReport) is filled when it runs.

    Raises ValueError for a sampler that has no sampler function to wrap, that cannot be corrected, or that is already.
    """
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"sampler: IEC wraps the samplers of KSamplerSelect and the like, and {type(sampler).__name__} is of another "
            "kind; choose one of those."
        )
    function = sampler.sampler_function
    check_sampler(getattr(function, "__name__", "").removeprefix("sample_"), settings)
    if getattr(function, "corrected_by_iec", False):
        raise ValueError(
            "sampler: IEC is applied twice to this sampling run; use only one of IECKSampler, IECApply and IECSampler."
        )

    @functools.wraps(function)
    def corrected(model, noise, sigmas, *args, **kwargs):
        report.start(sigmas.tolist())
        began = time.perf_counter()
        denoiser = CorrectedDenoiser(model, sigmas, settings, report)
        samples = function(denoiser, noise, sigmas, *args, **kwargs)
        samples.flatten()[:1].cpu()  # waits for the device, so that the seconds hold the last step's work too
        report.seconds = time.perf_counter() - began
        denoiser.finish(samples)
        return samples

    corrected.corrected_by_iec = True
    sampler = copy.copy(sampler)
    sampler.sampler_function = corrected
    return sampler


def apply_correction(model, settings, report):
    """Return a clone of a MODEL that corrects whatever sampling run it is used in."""

    def outer_sample(executor, noise, latent_image, sampler, *args, **kwargs):
        return executor(noise, latent_image, with_correction(sampler, settings, report), *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    return model
