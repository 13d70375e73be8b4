"""Progress of a run for the client: the host's progress bar, and the pack's own websocket events."""

import comfy.utils
from comfy_execution.utils import get_executing_context

from ....iec_core.run_report import TRACED
from ..server import running_server


def _workflow_of(server, prompt_id):
    """Return the id of the workflow that a running prompt was made from, "" if the prompt has no such id."""
    for _, running, _, about, *_ in getattr(server.prompt_queue, "currently_running", {}).values():
        if running == prompt_id:
            for key in ("extra_pnginfo", "workflow", "id"):
                about = about.get(key) if isinstance(about, dict) else None  # a client may send anything
            return about if isinstance(about, str) else ""
    return ""


class EvaluationProgress:
    """Counts the evaluations of one sampling run, and sends events about its steps.

    is_running, has_run: whether the corrected sampler function is running, and has run. The host's progress bar counts
    evaluations instead of steps. As always, the host checks for an interrupt at each update of the bar.

    Two kinds of events go to the client that queued the prompt; without a server nothing is sent. Both contain {workflow, node,
    source, prompt_id, label, correction, choice, steps, nfe}. workflow: the workflow's id, if the prompt has one. node: the
    node that samples. source: the node that asked for the correction. choice: what `auto` chose, and why. nfe: the evaluations
    so far. The first and the last event of a run also contain {corrected, full}: the numbers of the corrected steps, and of the
    steps that a cache evaluates in full, null without a cache. Other events leave them out, because in a long run they would be
    most of the data.

    `iec.step` is sent at the start of each step and at the end. It contains `step`, the number of finished steps, and
    `iterated`, the results of corrected steps since the last event: a list of {step, lambdas, residuals, contraction,
    fell_back}, with a mean over the batch for each iteration, and whether an image fell back. On a GPU the results arrive some
    steps later, because they are read without waiting. `iec.run` is sent after a run. It contains `iterated` of all corrected
    steps, `seconds`, and `warnings`, a list of sentences.
    """

    def __init__(self, has_bar=True):
        """has_bar: whether this object moves the progress bar; False if another pack calls the sampler function directly."""
        self._context = get_executing_context()
        self._has_bar = has_bar
        self._report, self._workflow, self._about = None, "", {}
        self._steps = self._total = self._bar = None
        self._evaluations = 0
        self.is_running = self.has_run = False

    def begin(self, report, corrected, full, steps, total):
        """Begin a run.

        corrected: numbers of the corrected steps. full: numbers of the steps that a cache evaluates in full, or None. steps:
        the number of steps. total: the largest possible number of evaluations.
        """
        self._report, self._about = report, {"corrected": sorted(corrected), "full": full}
        self._steps, self._total, self._evaluations = steps, total, 0
        self._bar = comfy.utils.ProgressBar(total) if self._has_bar else None

    def counting(self, callback):
        """Return the host's callback(step, denoised, x, total_steps) with evaluations instead of steps."""

        def counted(step, denoised, x, total_steps):
            if self._total is None:  # a run whose evaluations are not known beforehand
                return callback(step, denoised, x, total_steps)
            return callback(self._evaluations - 1, denoised, x, self._total)

        return None if callback is None else counted

    def evaluated(self):
        """Move the bar on."""
        self._evaluations += 1
        if self._bar is not None:
            self._bar.update_absolute(self._evaluations, self._total)

    def step(self, step, learned):
        """Send that `step` steps are done. learned: new StepReports, a list."""
        if step == self._steps and self._bar is not None:
            self._bar.update_absolute(self._total, self._total)  # the bar must be full even if iterations converged early
        self._send("iec.step", step=step, iterated=_told(learned), **(self._about if step == 0 else {}))

    def end(self):
        """Send that the run is over and its report is complete."""
        report = self._report
        corrected = [step for step in report.steps if step.corrected]
        self._send(
            "iec.run", iterated=_told(corrected), seconds=report.seconds, warnings=report.warnings, **self._about
        )  # fmt: skip

    def _send(self, event, **more):
        server = running_server()
        if self._context is None or server is None:
            return
        self._workflow = self._workflow or _workflow_of(server, self._context.prompt_id)
        data = {
            "workflow": self._workflow,
            "node": self._context.node_id,
            "source": self._report.source or self._context.node_id,
            "prompt_id": self._context.prompt_id,
            "label": self._report.label,
            "correction": self._report.correction,
            "choice": self._report.choice,
            "steps": self._steps,
            "nfe": self._report.nfe,
        }
        server.send_sync(event, {**data, **more}, server.client_id)


def _told(steps):
    """Return the content of an event for StepReports: numbers are means over the batch."""
    return [
        {"step": step.step, **{name: step.means(name) for name in TRACED}, "fell_back": any(step.fell_back)} for step in steps
    ]
