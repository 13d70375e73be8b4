"""The callables that a sampler function gets instead of the host's denoiser: they count evaluations and correct steps."""

import functools

import torch

from ....iec_core.correction.bias import CorrectedRun, bias_warning, moved_in_all
from ....iec_core.correction.iteration import corrected_denoised
from ....iec_core.log import logger
from ....iec_core.run_report import Stopwatch, TraceReader
from ..quantization.quantized_network import lost_changes
from ..sampling.network_calls import base_of, network_of, past_other_cache
from ..sampling.run_plan import Departed, with_place
from .exactness import is_exact
from .finiteness import Finiteness


class CountedDenoiser:
    """Replaces the host's denoiser for a sampler function and counts evaluations.

    Other attributes are those of the host's denoiser, because samplers read some of them.
    """

    def __init__(self, model, report, calls):
        self._model = model
        self._report = report
        self._calls = calls
        self.finite = Finiteness()

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **extra_args):
        denoised = self._counted(self._model, x, sigma, extra_args)[0]
        self.finite.evaluated(None, x, denoised)
        return denoised

    def _counted(self, model, x, sigma, extra_args):
        """Return (denoised prediction, number of network evaluations for it: 1 or 0)."""
        denoised = model(x, sigma, **extra_args)
        evaluations = int(self._calls.have_been())
        self._report.nfe += evaluations
        return denoised, evaluations


class CorrectedDenoiser(CountedDenoiser):
    """Corrects the steps in `corrected`, each at its own evaluation: the one whose prediction the step uses.

    Other evaluations of the sampler pass through. Nothing is read back from the device before `finish`.
    """

    def __init__(self, model, report, calls, plan, full, corrected, settings, noise, progress):
        super().__init__(model, report, calls)
        self._plan = plan
        self._full = full
        self._corrected = corrected
        self._settings = settings
        self._noise = noise
        self._progress = progress
        self._stopwatch = None
        self._begun = 0  # number of steps that have begun
        self._model_options = {}
        self._ahead = None  # the prediction for this step, if the step before evaluated it
        self._traces = TraceReader(report)
        report.start(plan.sigmas, corrected)

    def __call__(self, x, sigma, **extra_args):
        self._model_options = extra_args.get("model_options", {})
        step, is_own = self._checked(lambda: self._plan.begin()) or (None, False)
        if step is None:
            return super().__call__(x, sigma, **extra_args)
        if step == self._begun:
            self._begin(x.device)
        if is_own:
            self._report.keep(step, x)
        if step in self._corrected and is_own:
            return self._correct(step, x, sigma, extra_args)
        return self._own(step, x, sigma, extra_args)

    def _own(self, step, x, sigma, extra_args):
        """Return the prediction for an evaluation of the sampler. Evaluate it here, unless the step before already did."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            return ahead
        return self._evaluate(step, x, sigma, _tell(extra_args, self._plan.place(x)))

    def _correct(self, step, x, sigma, extra_args):
        own, of = self._plan.rehearsal.steps[step], self._settings.step_of(step)
        is_paper = self._settings.evaluation_point == "paper"
        level = own.evaluated_at if is_paper else own.evaluated_next

        def evaluate(x_in, at, iteration):
            if iteration == 0:
                return self._own(step, x, sigma, extra_args)
            place = self._plan.place_of_correction(x_in, of, iteration - (of - step), at)
            told = _past_other_cache(_tell(extra_args, place))
            model = self._holding(own.step) if is_paper else self._model
            return self._evaluate(step, x_in, torch.full_like(sigma, level), told, model)

        noise = self._noise.of(own.draws) if own.draws else None
        mask = None
        if extra_args.get("denoise_mask") is not None:
            mask = functools.partial(self._mask, x, sigma, extra_args)
        keep = functools.partial(self._keep, of) if of != step else None
        corrected, trace = corrected_denoised(evaluate, x, own.step, self._settings.at(step), noise, mask, keep)
        self._traces.add(step, trace)
        return corrected

    def _keep(self, step, prediction):
        """Keep a prediction that was evaluated ahead for this step."""
        self.finite.evaluated(step, None, prediction)
        self._ahead = prediction

    def _evaluate(self, step, x, sigma, extra_args, correcting=None):
        """Return the denoised prediction at x. correcting: the denoiser to call in a correction; None outside a correction."""
        denoised, evaluations = self._counted(correcting or self._model, x, sigma, extra_args)
        self._report.steps[step].nfe += evaluations
        if correcting is None:  # a correction that is not finite falls back, and needs no check
            self.finite.evaluated(step, x, denoised)
        self._progress.evaluated()
        return denoised

    def _holding(self, step):
        """Return a denoiser for corrections at the evaluation point `paper`, which evaluates the step's result.

        Outside the in-paint mask the latent must be the image with the result's noise level and scaling. The host would insert
        the image with the noise level of the step's start.
        """

        def denoise(x, sigma, **extra_args):
            model = self._model
            if extra_args.get("denoise_mask") is None or not hasattr(model, "latent_image"):
                return model(x, sigma, **extra_args)
            inside = self._mask(x, sigma, extra_args)
            held = model.inner_model.inner_model.scale_latent_inpaint(
                x=x, sigma=torch.full_like(sigma, step.sigma_next), noise=model.noise, latent_image=model.latent_image,
                denoise_mask=inside,
            )  # fmt: skip
            x = x * inside + step.input_scale * held * (1 - inside)
            denoised = model(x, sigma, **{**extra_args, "denoise_mask": None})
            return denoised * inside + model.latent_image * (1 - inside)

        return denoise

    def _mask(self, x, sigma, extra_args):
        """Return, for each number of x, the share that may be corrected.

        Outside the in-paint mask the prediction is the image to keep, not the network's prediction.
        """
        mask = extra_args["denoise_mask"]
        change = extra_args.get("model_options", {}).get("denoise_mask_function")
        if change is not None:  # as in the host's KSamplerX0Inpaint
            options = {"model": self._model.inner_model, "sigmas": self._model.sigmas}
            mask = change(sigma, mask, extra_options=options)
        return mask.to(x).expand_as(x)

    def _begin(self, device):
        self._stopwatch = self._stopwatch or Stopwatch(device)
        self._stopwatch.mark()
        self._progress.step(self._begun, self._traces.take())
        self._begun += 1

    def on_step(self, info):
        """Check a sampler's callback against the plan."""
        self._checked(lambda: self._plan.called_back(info["i"]))

    def _checked(self, call):
        """Return call(), which checks the plan; None if there is no plan.

        If the run departs from its plan, a run with corrections raises Departed. A run without corrections continues without a
        plan, and its report then has no steps.
        """
        if self._plan is None:
            return None
        try:
            return call()
        except Departed:
            if self._corrected:
                raise
            self._plan, self._report.steps = None, []
            return None

    def finish(self, samples):
        """Store the run's final latent in the report, and read back the results from the device."""
        self._checked(lambda: self._plan.check_is_over())
        self._begin(samples.device)  # marks the end of the last step
        self._report.keep(len(self._report.sigmas) - 1, samples)
        seconds = self._stopwatch.seconds()
        self._traces.take(wait=True)
        self._report.finish(seconds)
        self._warn()

    def _warn(self):
        """Add the bias of the corrections to the report, with the `bias_warning` if there is one, and log all its warnings.

        Then add the warning about lost patches, which is already in the log.
        """
        if self._corrected:
            self._tell_bias()
        for warning in self._report.warnings:
            logger.warning(f"{warning}")
        tell_lost_changes(self._report, self._model)

    def _tell_bias(self):
        rehearsed, network = self._plan.rehearsal, network_of(self._model)
        run = CorrectedRun(
            self._settings.evaluation_point,
            tuple(step.gain for step in rehearsed.steps),
            rehearsed.evaluates_more_than_once,
            any(rehearsed.steps[step].step.input_scale != 1 for step in self._corrected),
            self._full,
            network is not None and is_exact(network, self._model_options),
        )
        self._report.moved = float(f"{moved_in_all(self._report.steps, run):.3g}")
        if warning := bias_warning(self._report.steps, run):
            self._report.warnings.append(f"{self._report.label}: {warning}")


def tell_lost_changes(report, model):
    """Add the warning about patches lost on a run's quantized MODEL to its report. The log has it once per set of patches."""
    if warning := lost_changes(base_of(model)):
        report.warnings.append(f"{report.label}: {warning}")


def _tell(extra_args, told):
    """Return a sampler's extra arguments with the place of the evaluation, `told`."""
    return {**extra_args, "model_options": with_place(extra_args.get("model_options", {}), told)}


def _past_other_cache(extra_args):
    """Return a sampler's extra arguments that make the host's own cache let the network evaluate."""
    model_options = extra_args["model_options"]
    options = past_other_cache(model_options["transformer_options"])
    return {**extra_args, "model_options": {**model_options, "transformer_options": options}}
