"""What a client is told while a run goes on: the host's progress bar, and websocket events of our own."""

import sys

import comfy.utils
from comfy_execution.utils import get_executing_context

from ....iec_core.run_report import TRACED


def running_server():
    """Return the host's server if this process is one, else None. Only a server has that module."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _workflow_of(server, prompt_id):
    """Return the id of the workflow that a running prompt was made from, "" where it came without one."""
    for _, running, _, about, *_ in getattr(server.prompt_queue, "currently_running", {}).values():
        if running == prompt_id:
            for key in ("extra_pnginfo", "workflow", "id"):
                about = about.get(key) if isinstance(about, dict) else None  # a client may send anything
            return about if isinstance(about, str) else ""
    return ""


class EvaluationProgress:
    """Counts the evaluations of one sampling run, and tells of its steps. is_running, has_run: of the corrected function.

    The host's bar counts evaluations instead of steps; as always, an update is also where the host looks for an interrupt.

    Two events go to the client that queued the prompt; they are silent where no server runs. Both tell {workflow, node, source,
    prompt_id, label, correction, choice, steps, nfe}: the workflow's id if it came with the prompt, the node that samples, the
    one that asked for the correction, what `auto` chose and why, and the evaluations so far. A run's first event and its last
    tell {corrected, full} too: the numbers of the corrected steps, and of those that a cache evaluates in full, null without
    one. In every event of a long run these would be most of what is sent.

    `iec.step`, at the start of each step and at the end: step, the number of steps finished, and `iterated`, a list of what
    was learned of corrected steps since the last event, {step, lambdas, residuals, contraction, fell_back}: a mean over the
    batch for each iteration, and whether an image fell back. A GPU's come some steps later, as they are read without waiting.
    `iec.run`, after a run: iterated, of all corrected steps; seconds; warnings, sentences.
    """

    def __init__(self, has_bar=True):
        """has_bar: whether the bar is ours to move; it is not where another pack calls a sampler function by itself."""
        self._context = get_executing_context()
        self._has_bar = has_bar
        self._report, self._workflow, self._about = None, "", {}
        self._steps = self._total = self._bar = None
        self._evaluations = 0
        self.is_running = self.has_run = False

    def begin(self, report, corrected, full, steps, total):
        """Begin a run of so many steps and, at most, evaluations. corrected: numbers of steps. full: such, or None."""
        self._report, self._about = report, {"corrected": sorted(corrected), "full": full}
        self._steps, self._total, self._evaluations = steps, total, 0
        self._bar = comfy.utils.ProgressBar(total) if self._has_bar else None

    def counting(self, callback):
        """Return the host's callback(step, denoised, x, total_steps), told evaluations where it is told steps."""

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
        """Tell that `step` steps are done, and what was `learned`, a list of StepReports."""
        if step == self._steps and self._bar is not None:
            self._bar.update_absolute(self._total, self._total)  # iterations that converged early are done too
        self._send("iec.step", step=step, iterated=_told(learned), **(self._about if step == 0 else {}))

    def end(self):
        """Tell that the run is over and its report complete."""
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
    """Return what an event tells of StepReports: numbers are means over the batch."""
    return [
        {"step": step.step, **{name: step.means(name) for name in TRACED}, "fell_back": any(step.fell_back)} for step in steps
    ]
