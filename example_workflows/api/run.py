"""Runs a workflow in API form on a running ComfyUI: shows its progress, and saves its images.

    python run.py corrected_image.json images
    python run.py corrected_image.json images --server 192.168.0.7:8188

Needs aiohttp alone, which every ComfyUI has in its own Python.
"""

import argparse
import asyncio
import json
import pathlib
import sys
import uuid
from typing import Any

import aiohttp

Workflow = dict[str, Any]  # {node id: {"class_type": node, "inputs": {input: value or [node id, output]}}}
Outputs = dict[str, Any]  # {node id: what the node shows, such as {"images": [...]}}


class RunError(Exception):
    """The file is not a workflow, the server refused it, or the run did not finish."""


def read_workflow(path: pathlib.Path) -> Workflow:
    """Return the workflow of a file. Raises RunError if it is not in API form, OSError if it cannot be read."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: this is not JSON ({error}).") from error
    nodes = workflow.values() if isinstance(workflow, dict) else [None]
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise RunError(
            f"{path}: this is not a workflow in API form; in ComfyUI, open it and take Export (API) from the menu, "
            "or take one of example_workflows/api."
        )
    return workflow


def refusal(answer: dict[str, Any]) -> str:
    """Return the server's reasons for refusing a workflow, one line per mistake."""
    lines = []
    for name, node in answer.get("node_errors", {}).items():
        for error in node["errors"]:
            sentence = f"{error['message']}: {error['details']}"
            if error["type"] == "custom_validation_failed":  # the node's own sentence, repeated for each input
                sentence = error["details"].partition(" - ")[2]
            lines.append(f"{node['class_type']} ({name}): {sentence}")
    if not lines:
        error = answer.get("error", answer)
        lines = [f"{error['message']} {error.get('details', '')}".strip() if "message" in error else str(error)]
    return "\n".join(dict.fromkeys(lines))


async def submit(session: aiohttp.ClientSession, workflow: Workflow, client: str) -> str:
    """Queue a workflow and return the id of its prompt. Raises RunError if it is refused."""
    async with session.post("/prompt", json={"prompt": workflow, "client_id": client}) as response:
        answer = await response.json()
    if response.status != 200 or answer["node_errors"]:
        raise RunError(refusal(answer))
    return str(answer["prompt_id"])


def show(line: str) -> None:
    """Write a line over the last one, cut to the width of a terminal."""
    print(f"\r{line[:78]:<78}", end="", file=sys.stderr, flush=True)


async def follow(connection: aiohttp.ClientWebSocketResponse, prompt: str) -> None:
    """Show a prompt's progress until it is done.

    Raises RunError if the run fails or is interrupted, or if the server closes the connection.
    """
    in_steps = set()  # nodes that report their steps
    async for message in connection:
        if message.type is not aiohttp.WSMsgType.TEXT:  # previews of the image
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") != prompt:
            continue
        if kind == "iec.step":
            in_steps.add(data["node"])
            show(
                f"{data['label']}, IEC {data['correction']}: step {data['step']} of {data['steps']}, {data['nfe']} evaluations"
            )
        elif kind == "progress" and data["node"] not in in_steps:
            show(f"{data['node']}: {data['value']} of {data['max']}")
        elif kind == "execution_error":
            raise RunError(f"{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}")
        elif kind == "execution_interrupted":
            raise RunError("the run was interrupted")
        elif kind == "executing" and data["node"] is None:  # sent when the outputs can be requested
            return
    raise RunError("the server closed the connection")


async def save_images(session: aiohttp.ClientSession, outputs: Outputs, folder: pathlib.Path) -> list[pathlib.Path]:
    """Write all images of a prompt's outputs to a folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shown in outputs.values():
        for image in shown.get("images", []):
            place = {key: image[key] for key in ("filename", "subfolder", "type")}
            async with session.get("/view", params=place) as response:
                response.raise_for_status()
                paths.append(folder / pathlib.PurePath(image["filename"]).name)
                paths[-1].write_bytes(await response.read())
    return paths


async def run(workflow: Workflow, folder: pathlib.Path, server: str) -> list[pathlib.Path]:
    """Run a workflow on the server at host:port, and return the paths of its images in the folder."""
    client = uuid.uuid4().hex
    forever = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(f"http://{server}", timeout=forever) as session,
        session.ws_connect("/ws", params={"clientId": client}, max_msg_size=0) as connection,
    ):
        prompt = await submit(session, workflow, client)
        try:
            await follow(connection, prompt)
        finally:
            print(file=sys.stderr)
        async with session.get(f"/history/{prompt}") as response:
            history = await response.json()
        return await save_images(session, history[prompt]["outputs"], folder)


def address(text: str) -> str:
    """Return host:port from a text, which may also be a URL such as http://host:port/."""
    return text.removeprefix("http://").rstrip("/")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a workflow in API form on a running ComfyUI, and save its images.")
    parser.add_argument("workflow", type=pathlib.Path, help="the JSON file")
    parser.add_argument("folder", type=pathlib.Path, help="where the images go")
    parser.add_argument(
        "--server", type=address, default="127.0.0.1:8188", help="host:port of the ComfyUI, by default %(default)s"
    )
    arguments = parser.parse_args()
    try:
        workflow = read_workflow(arguments.workflow)
        for path in asyncio.run(run(workflow, arguments.folder, arguments.server)):
            print(path)
    except aiohttp.WSServerHandshakeError as error:
        sys.exit(f"What answers at {arguments.server} is no ComfyUI: name one with --server host:port. ({error.message})")
    except aiohttp.ClientConnectorError as error:
        sys.exit(f"No ComfyUI answers at {arguments.server}: start it, or name another with --server host:port. ({error})")
    except (OSError, ValueError, aiohttp.ClientError, RunError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
