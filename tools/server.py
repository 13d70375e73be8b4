"""A headless ComfyUI server on a free loopback port, and the part of its HTTP and websocket API that a client needs."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid

import comfyui
import processes
import requests
import websocket


def free_port():
    """Return a loopback TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Refused(Exception):
    """POST /prompt answered with an error; `answer` is the server's JSON."""

    def __init__(self, status, answer):
        self.status = status
        self.answer = answer
        errors = [error for node in answer.get("node_errors", {}).values() for error in node["errors"]]
        sentences = [f"{error['message']}: {error['details']}" for error in errors]
        super().__init__(f"{status}: {'; '.join(sentences) or answer}")


class Failed(Exception):
    """A prompt ended with an error in a node, or was interrupted; `event` is the websocket message's data."""

    def __init__(self, event):
        self.event = event
        super().__init__(event.get("exception_message", "interrupted").strip())


class Server:
    """A client of one running server; log: its file; pid: of its process."""

    def __init__(self, port, log, pid):
        self.url = f"http://127.0.0.1:{port}"
        self.log, self.pid, self._port = log, pid, port

    def get(self, path, **params):
        """Return the JSON that GET `path` answers."""
        answer = requests.get(self.url + path, params=params, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def image(self, entry):
        """Return the bytes of an image that a finished prompt's output names."""
        keys = ("filename", "subfolder", "type")
        answer = requests.get(self.url + "/view", params={k: entry[k] for k in keys}, timeout=60)
        answer.raise_for_status()
        return answer.content

    def _submit(self, workflow, client):
        body = json.dumps({"prompt": workflow, "client_id": client})  # requests' own encoder would refuse NaN
        answer = requests.post(self.url + "/prompt", data=body, timeout=60)
        if answer.status_code != 200 or answer.json()["node_errors"]:  # status 200 with errors: some outputs would be missing
            raise Refused(answer.status_code, answer.json())
        return answer.json()["prompt_id"]

    def interrupt(self):
        """Interrupt the prompt that is running."""
        requests.post(self.url + "/interrupt", timeout=60).raise_for_status()

    def forget(self):
        """Clear the server's cached node outputs; otherwise an equal prompt would not run its nodes again."""
        requests.post(self.url + "/free", json={"free_memory": True}, timeout=60).raise_for_status()

    def clear_history(self):
        """Clear the server's list of executed prompts, which every opened page requests."""
        requests.post(self.url + "/history", json={"clear": True}, timeout=60).raise_for_status()

    def run(self, workflow, on_event=lambda kind, data: None):
        """Run an API workflow to its end and return its outputs, {node id: ui output}.

        on_event(kind, data) is called for every websocket message during the run. Raises Refused, or Failed if a node fails,
        the run is interrupted or the server ends.
        """
        client = uuid.uuid4().hex
        address = f"ws://127.0.0.1:{self._port}/ws?clientId={client}"
        with contextlib.closing(websocket.create_connection(address, timeout=600)) as connection:
            prompt = self._submit(workflow, client)
            while True:
                try:
                    message = connection.recv()
                except (OSError, websocket.WebSocketException) as error:
                    raise Failed({"exception_message": f"the connection to the server was lost: {error}"}) from error
                if not isinstance(message, str):  # previews
                    continue
                if not message:
                    raise Failed({"exception_message": "the server closed the connection"})
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                on_event(kind, data)
                if data.get("prompt_id") != prompt:
                    continue
                if kind in ("execution_error", "execution_interrupted"):
                    raise Failed(data)
                if kind == "executing" and data["node"] is None:  # sent when the history is written
                    return self.get(f"/history/{prompt}")[prompt]["outputs"]


def _wait_until_up(process, port, log, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            requests.get(f"http://127.0.0.1:{port}/system_stats", timeout=5).raise_for_status()
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"ComfyUI did not start; the end of its log:\n{tail}")


def _stop(process):
    """End the server's process group: with a request first, and by force after ten seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            return


def _base(folder, models):
    """Make the base directory of a server with these models and no custom nodes but the pack; return its path."""
    (folder / "custom_nodes").mkdir(parents=True)
    (folder / "custom_nodes" / comfyui.PACK).symlink_to(comfyui.ROOT, target_is_directory=True)
    (folder / "models").symlink_to(models, target_is_directory=True)
    return folder


@contextlib.contextmanager
def serve(output=None, arguments=(), models=None):
    """Start the provided ComfyUI with no custom nodes but this pack, yield a Server, and end it on exit.

    output: folder for what the workflows save; default: a folder that is removed. arguments: more command-line options. models:
    a folder that replaces ComfyUI's own `models`. Uses the GPU if torch sees one. Raises RuntimeError, with the end of the
    server's log, if it does not start.
    """
    import torch

    folder, port = comfyui.provide(), free_port()
    with tempfile.TemporaryDirectory(prefix="comfyui-iec-") as scratch:
        scratch = pathlib.Path(scratch)
        places = {name: scratch / name for name in ("output", "input", "temp", "user")}
        if output is not None:
            places["output"] = pathlib.Path(output).resolve()
        command = [sys.executable, str(folder / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
        for name, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            command += [f"--{name}-directory", str(place)]
        if models is not None:
            command += ["--base-directory", str(_base(scratch / "base", pathlib.Path(models).resolve()))]
        command += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", comfyui.PACK]
        command += [] if torch.cuda.is_available() else ["--cpu"]
        log = scratch / "server.log"
        process = None
        try:
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    [*command, *arguments],
                    cwd=folder,
                    stdout=sink,
                    stderr=sink,
                    start_new_session=True,  # Ctrl-C then reaches only this process, which ends the server
                    preexec_fn=processes.end_with_parent,
                )
            _wait_until_up(process, port, log, seconds=180)
            yield Server(port, log, process.pid)
        finally:
            if process is not None:
                _stop(process)
