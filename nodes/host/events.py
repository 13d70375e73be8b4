"""The pack's own websocket events, which tell a client what the host's progress messages do not: the evaluations."""

from comfy_execution.utils import get_executing_context


class ProgressEvents:
    """Sends `iec.step` events for one sampling run: {node, prompt_id, label, correction, step, steps, nfe}.

    step: number of steps finished; nfe: evaluations so far. Silent where no server runs.
    """

    def __init__(self, report, steps):
        self._context = get_executing_context()
        self._report = report
        self._steps = steps

    def step(self, step):
        """Report that `step` steps are done."""
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
