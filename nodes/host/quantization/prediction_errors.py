"""Measure how a MODEL's predictions change in a sampling run if one layer is quantized and all others are unchanged."""

import contextlib

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ....iec_core.advice import TRY_PRECISION
from ....iec_core.quantization.mixed_precision import PredictionError
from ..caching.cached_model import without_cache
from ..sampling.calibration_runs import open_to_hooks
from ..sampling.network_calls import past_other_cache
from ..sampling.run_plan import follow_run, place

KEY = "iec_prediction_errors"
EVALUATIONS = 4  # measured evaluations, spread over the run; one alone ranks the layers nearly as well as many do
ELEMENTS = 2**14  # the most elements of a prediction that are compared; of a larger prediction, random ones


def _nothing(*_):
    return contextlib.nullcontext()


def prediction_errors(model, choices, run, bar, within=_nothing):
    """Return {name: [a PredictionError for each choice]}, measured in one run with the unchanged MODEL.

    choices: {name: list of quantized layers that can replace the MODEL's layer of that name}. run: Runs with a single run. bar:
    a Bar; it advances by the run's steps and by `evaluations_of` the choices. within(x, timestep, transformer_options): returns
    a context manager for the evaluations.

    A prediction is the denoised latent with guidance, as the sampler gets it. Raises ValueError if a prediction is not finite.
    """
    measured = _Measured(model, choices, run.steps, bar, within)
    model = without_cache(open_to_hooks(model))
    follow_run(model)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, measured)
    run.sample(bar, model)
    return measured.errors


def evaluations_of(choices, steps):
    """Return how many evaluations `prediction_errors` adds to a run of so many steps. choices: the number of all choices."""
    return len(_steps_of(steps)) * choices


def _steps_of(steps):
    """Return the steps of a run in which errors are measured: the middle step of each quarter."""
    return {(2 * number + 1) * steps // (2 * EVALUATIONS) for number in range(EVALUATIONS)}


class _Measured:
    """A wrapper around a guider's predictions that measures errors in some of them."""

    def __init__(self, model, choices, steps, bar, within):
        self.errors = {name: [PredictionError(steps) for _ in layers] for name, layers in choices.items()}
        modules = dict(model.model.diffusion_model.named_modules())
        self._layers = {name: modules[name] for name in choices}
        self._choices, self._bar, self._within = choices, bar, within
        self._left = None  # steps that are still to be measured; None before the first evaluation

    def __call__(self, executor, x, timestep, model_options=None, seed=None):
        options = past_other_cache((model_options or {}).get("transformer_options", {}))
        told = place({**options, "sigmas": timestep})
        if told is None:
            return executor(x, timestep, model_options, seed)
        self._left = _steps_of(told["schedule"].steps) if self._left is None else self._left
        if told["step"] not in self._left:
            return executor(x, timestep, model_options, seed)
        self._left.remove(told["step"])
        model_options = {**model_options, "transformer_options": options}
        with self._within(x, timestep, options):
            return self._measure(lambda: executor(x, timestep, model_options, seed))

    def _measure(self, predict):
        expected = predict()
        places = _places(expected.numel(), expected.device)
        scale = (expected.numel() / len(places)) ** 0.5 / expected.float().norm()
        for name, layers in self._choices.items():
            for layer, error in zip(layers, self.errors[name]):
                comfy.model_management.throw_exception_if_processing_interrupted()
                with _standing_for(self._layers[name], layer):
                    change = (predict() - expected).flatten()[places].float() * scale
                if not change.isfinite().all():
                    raise ValueError(
                        f"model: a prediction with its layer {name} quantized, or in full precision, contains NaN or infinity. "
                        f"{TRY_PRECISION}"
                    )
                error.take_up(change.cpu())
                self._bar.advance()
        return expected


def _places(count, device):
    """Return indices int64 [n] of elements to compare; they are equal for predictions of equal size."""
    if count <= ELEMENTS:
        return torch.arange(count, device=device)
    return torch.randint(count, (ELEMENTS,), generator=torch.Generator().manual_seed(0)).to(device)


@contextlib.contextmanager
def _standing_for(layer, other):
    """Replace the output of a layer by that of another layer."""
    hook = layer.register_forward_hook(lambda module, inputs, output: other(inputs[0]))
    try:
        yield
    finally:
        hook.remove()
