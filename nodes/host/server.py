"""The host's server, where there is one, and what it shows on nodes."""

import sys

from comfy_execution.utils import get_executing_context


def running_server():
    """Return the host's server if this process is a server, else None. Only a server has loaded the module `server`."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_text(text):
    """Show a text on the running node, in place of the previous one. Without a server, or outside a prompt, nothing happens."""
    server, context = running_server(), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id, server.client_id)
