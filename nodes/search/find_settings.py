"""IECFindSettings: measure which settings make a MODEL as fast as asked at the least error, and give the MODEL ready made."""

import json

import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ...iec_core.choices import unknown_choice
from ...iec_core.log import logger
from ...iec_core.metrics import pareto_front
from ...iec_core.search.search import Search
from ...iec_core.search.trials import Goal
from ...iec_core.search.verdict import HEADER, table, verdict
from ..calibration import run_inputs, taken_runs, wrong_run_choice
from ..host.inputs import CheckedNode, known_values
from ..host.schema import schema
from ..host.search.measuring import Measuring
from ..host.search.model import check_model
from ..host.search.space import CONVERGED_NEEDS, adds_noise, as_dict, described, space_of
from ..host.search.variants import Variants
from ..host.server import show_text
from ..reports import plots
from ..types import ChoiceOutput, as_image, shown_on

TIME, ERROR = "least error in a time", "least time for an error"
GOALS = [TIME, ERROR]
SELF, CONVERGED = "full run", "converged"
REFERENCES = [SELF, CONVERGED]
# {effort: (about how many times a full run the search takes, how many different runs it measures)}
EFFORTS = {"quick": (10, 2), "normal": (25, 4), "thorough": (60, 8)}
TRIES = {
    "fewer_steps": (True, "Runs of fewer steps."),
    "other_samplers": (True, "Other samplers and schedulers of ComfyUI, of those that add no noise."),
    "caches": (True, "DeepCache (IEC), and ComfyUI's EasyCache."),
    "calibrated_cache": (True, "CacheQuant (IEC). Each calibration takes about two full runs, so quick seldom gets to it."),
    "eight_bits": (True, "8-bit weights and activations."),
    "fp8": (False, "Weights and activations in float8."),
    "four_bits": (False, "4-bit weights with a low-rank branch, as from Calibrate Weights (IEC), and 8-bit activations."),
    "correction": (True, "IEC with correction_steps auto, for the samplers that it can correct."),
}  # fmt: skip


class IECFindSettings(CheckedNode):
    @classmethod
    def define_schema(cls):
        inputs = {one.id: one for one in run_inputs("")}
        del inputs["runs"]
        return schema(
            node_id="IECFindSettings",
            display_name="Find Settings (IEC)",
            category="advanced/model/IEC",
            description="Runs your model on your prompts with fewer steps, caches, quantization and correction, measures the "
            "time and the error of each, and finds the settings with the least error in the time that you allow. Its outputs "
            "are the model with these settings, and the steps, sampler and scheduler for a KSampler.",
            search_aliases=[
                "auto settings",
                "optimize",
                "benchmark",
                "search",
                "tune",
                "faster",
                "speed up",
                "which threshold",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model in full precision, without a cache or IEC; the node does not change it."
                ),
                *inputs.values(),
                io.Combo.Input(
                    "goal",
                    options=GOALS,
                    default=TIME,
                    tooltip="least error in a time: limit is the longest time. least time for an error: limit is the largest "
                    "error. Start with least error in a time.",
                ),
                io.Float.Input(
                    "limit",
                    default=0.5,
                    min=0.001,
                    max=10.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="With least error in a time: a share of the full run's time, below 1. With least time for an "
                    "error: the relative error of the latent; about 0.05 is hardly visible. Start with 0.5 for a time.",
                ),
                io.Combo.Input(
                    "reference",
                    options=REFERENCES,
                    default=SELF,
                    tooltip="What errors are relative to. full run: the result of your own settings. converged: the result of "
                    "four times the steps, so that settings can be better than your own. Start with full run.",
                ),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default="normal",
                    tooltip="About how long the search takes, in full runs, in addition to those for the reference: quick 10, "
                    "normal 25, thorough 60. Start with normal.",
                ),
                *(
                    io.Boolean.Input(name, default=default, optional=True, tooltip=f"Whether to try this. {tip}")
                    for name, (default, tip) in TRIES.items()
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the settings that were found, for a KSampler."),
                io.Int.Output(display_name="steps", tooltip="The number of steps for the KSampler."),
                ChoiceOutput(display_name="sampler_name", tooltip="The sampler for the KSampler."),
                ChoiceOutput(display_name="scheduler", tooltip="The scheduler for the KSampler."),
                io.String.Output(display_name="settings", tooltip="The settings that were found, as JSON."),
                io.String.Output(display_name="verdict", tooltip="What was found, in words."),
                io.String.Output(display_name="table", tooltip="Everything that was tried, in Markdown."),
                io.Image.Output(display_name="plot", tooltip="Errors and times of everything that was tried."),
            ],
        )

    @classmethod
    @known_values
    def validate_inputs(
        cls, goal=None, limit=None, reference=None, effort=None, sampler_name=None, scheduler=None, fewer_steps=None,
        other_samplers=None, caches=None, calibrated_cache=None, eight_bits=None, fp8=None, four_bits=None, correction=None,
    ):  # fmt: skip
        tried = (fewer_steps, other_samplers, caches, calibrated_cache, eight_bits, fp8, four_bits, correction)
        if all(one is False for one in tried):
            return f"{', '.join(TRIES)}: all are off, so that there is nothing to try; turn on at least one."
        if goal == TIME and limit is not None and limit >= 1:
            return f"limit: {limit:g} is not less than the full run's time; write a share of it below 1, such as 0.5."
        if reference == CONVERGED and sampler_name is not None and adds_noise(sampler_name):
            return (
                f"reference: {CONVERGED} {CONVERGED_NEEDS}, but {sampler_name} adds noise; choose {SELF}, or another sampler."
            )
        wrong = unknown_choice(GOALS, goal=goal) or unknown_choice(REFERENCES, reference=reference)
        wrong = wrong or unknown_choice(EFFORTS, effort=effort)
        return wrong or wrong_run_choice(sampler_name, scheduler) or True

    @classmethod
    def run(cls, model, goal, limit, reference, effort, **more):
        check_model(model)
        tried = {name: more.pop(name, default) for name, (default, _) in TRIES.items()}
        runs = taken_runs({**more, "runs": 1})
        budget, different = EFFORTS[effort]
        space, levels = space_of(model, runs.sampling, tried)
        variants = Variants(model, runs.first, levels)
        bar = comfy.utils.ProgressBar(1000)
        measuring = Measuring(model, variants, levels, runs, space.full, reference == CONVERGED)
        number = max(different, len(runs.prompts))
        search = Search(space, Goal(goal == TIME, limit), measuring.measure, lambda: measuring.full_seconds, number, budget)
        for share in search.progress():
            bar.update_absolute(round(1000 * share))
            _show_progress(search, share, levels)
        bar.update_absolute(1000)
        return cls._output(search, levels, variants)

    @classmethod
    def _output(cls, search, levels, variants):
        best = search.best
        said = verdict(search, lambda candidate: described(levels, candidate))
        logger.info(f"Find Settings (IEC): {said}")
        show_text(said)
        if best is None:
            raise ValueError(f"model: {said}")
        settings, way = as_dict(levels, best.candidate), best.candidate.way
        lines = table(list(search.rows.values()), search, lambda candidate: described(levels, candidate))
        text = "\n".join(f"| {' | '.join(line)} |" for line in (HEADER, ("---",) * len(HEADER), *lines))
        plot = as_image(_plot(search, levels, said))
        return io.NodeOutput(
            variants.model(best.candidate), settings["steps"], way.sampler, way.scheduler, json.dumps(settings, indent=1), said,
            text, plot, ui=shown_on(cls, plot, f"{said}\n\n{text}"),
        )  # fmt: skip


def _show_progress(search, share, levels):
    """Log the candidate that was measured last; show on the node the best so far, and how long the search will still take."""
    left = f"{share:.0%} done, about {(1 - share) * search.budget * search.last.full_seconds:.0f} s left"
    logger.info(f"Find Settings (IEC): {_in_words(search.last, levels)}; {left}")
    show_text(f"{left}. Best so far: {_in_words(search.best, levels)}" if search.best else left)


def _in_words(row, levels):
    found = row.reason or f"error {row.error:.3g} at {row.share:.2f} of the time"
    return f"{described(levels, row.candidate)}: {found}"


def _plot(search, levels, said):
    """Return the plot. Errors above 1 are left out, and the full run where its error is 0: it is the line to which errors are
    relative.
    """
    rows = [row for row in search.rows.values() if row.has_run and (0 < row.error <= 1 or row is search.best)]
    front = pareto_front([(row.share, row.error) for row in rows])
    candidates = [(described(levels, row.candidate), row.share, row.error) for row in rows]
    return plots.found_settings(candidates, front, rows.index(search.best), said)


NODES = [IECFindSettings]
