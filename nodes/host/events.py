"""What a client is told while a run goes on: the host's progress bar, and websocket events of our own."""

import comfy.utils
from comfy_execution.utils import get_executing_context


class EvaluationProgress:
    """Counts the evaluations of one sampling run.

    The host's bar counts evaluations instead of steps; as always, an update is also where the host looks for an interrupt.
    `iec.step` events tell {node, prompt_id, label, correction, step, steps, nfe} at the start of each step and at the end:
    step is the number of steps finished, nfe of evaluations so far. They are silent where no server runs.
    """

    def __init__(self, report):
        self._context = get_executing_context()
        self._report = report
        self._steps = self._total = self._bar = None

    def begin(self, steps, total):
        """Begin a run of so many steps and, at most, evaluations."""
        self._steps, self._total = steps, total
        self._bar = comfy.utils.ProgressBar(total)

    def counting(self, callback):
        """Return the host's callback(step, denoised, x, total_steps), told evaluations where it is told steps."""

        def counted(step, denoised, x, total_steps):
            if self._total is None:  # a run whose evaluations are not known beforehand
                return callback(step, denoised, x, total_steps)
            return callback(self._report.nfe - 1, denoised, x, self._total)

        return None if callback is None else counted

    def evaluated(self):
        """Move the bar on."""
        self._bar.update_absolute(self._report.nfe, self._total)

    def step(self, step):
        """Tell that `step` steps are done."""
        if step == self._steps:
            self._bar.update_absolute(self._total, self._total)  # iterations that converged early are done too
        if self._context is None:
            return
        from server import PromptServer

        server = getattr(PromptServer, "instance", None)
        if server is None:
            return
        data = {
            "node": self._context.node_id,
            "prompt_id": self._context.prompt_id,
            "label": self._report.label,
            "correction": self._report.correction,
            "step": step,
            "steps": self._steps,
            "nfe": self._report.nfe,
        }
        server.send_sync("iec.step", data, server.client_id)
