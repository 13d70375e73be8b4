"""The HTTP route on which the frontend asks what a sampling run will do."""

import asyncio
import json
import math
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web

from ....iec_core.correction.correction_steps import steps_within
from ....iec_core.log import logger
from .step_plan import NotKnown, step_plan

ROUTE = "/iec/step_plan"


def _mended(correction, **question):
    """Return the step plan of a refused run, without the steps in its correction_steps that the run does not have.

    A client can offer the other steps. Return {} if the run is refused for another reason too.
    """
    try:
        steps = step_plan({**correction, "correction_steps": "none"}, **question)["steps"]
        inside = steps_within(correction.get("correction_steps", "all"), steps)
        return step_plan({**correction, "correction_steps": inside}, **question)
    except ValueError:
        return {}


def _plan_or_refusal(question):
    try:
        return step_plan(**question)
    except NotKnown:
        raise
    except ValueError as error:
        return {**_mended(**question), "error": str(error)}


def _answer(question):
    """Return the step plan for a client's question, which is a result of `read_question`.

    If the run would be refused, return {"error": sentence}, together with a plan if only correction_steps is wrong. If the plan
    is not known, return {"unknown": sentence}.
    """
    try:
        return _plan_or_refusal(question)
    except NotKnown as reason:
        return {"unknown": str(reason)}
    except Exception as error:  # a client gets an answer whatever it sent
        logger.warning(f"no step plan for {str(question)[:500]}: {error!r}")
        return {"unknown": "The steps cannot be determined; the server's log says why."}


class BadQuestion(ValueError):
    """A client's question does not have the form that the frontend extension uses. The argument is a sentence."""


CORRECTION = {
    "correction_steps": str, "lambda_": float, "max_iterations": int, "tolerance": float, "evaluation_point": str,
    "lambda_mode": str, "lambdas": str,
}  # fmt: skip


SAMPLING = {
    "steps": int, "sampler_name": str, "scheduler": str, "denoise": float, "start_step": int, "last_step": int,
    "force_full_denoise": bool, "is_custom": bool,
}  # fmt: skip


CACHE = {
    "interval": int, "schedule": str, "start_percent": float, "end_percent": float, "speed": float, "profile_name": str,
}  # fmt: skip


QUESTION = {"correction": CORRECTION, "sampling": SAMPLING, "cache": CACHE, "correction_pass": str, "is_cache_open": bool}


NEEDED = {"question": ("correction", "sampling"), "sampling": ("steps", "sampler_name", "scheduler")}


KINDS = {dict: "an object", str: "a text", int: "a whole number of at least 0", float: "a number", bool: "true or false"}


def read_question(text):
    """Return a client's question, a JSON text, as a dict of arguments for `step_plan`. Raises BadQuestion."""
    try:
        question = json.loads(text)
    except (ValueError, RecursionError):
        raise BadQuestion("question: it is not JSON; send an object with correction and sampling.") from None
    question = _checked("question", question, QUESTION)
    return {name: value for name, value in question.items() if value is not None}


def _checked(name, value, kind):
    """Return the value of a part of a question if it has the right kind, else raise BadQuestion.

    kind: a type, or a dict {name of a sub-part: its kind}.
    """
    if isinstance(kind, type):
        accepted = {float: (float, int)}.get(kind, (kind,))
        if type(value) not in accepted or (kind is float and not math.isfinite(value)) or (kind is int and value < 0):
            raise BadQuestion(f"{name}: {json.dumps(value)[:50]} is not {KINDS[kind]}.")
        return value
    if type(value) is not dict:
        raise BadQuestion(f"{name}: {json.dumps(value)[:50]} is not {KINDS[dict]}.")
    if unknown := sorted(value.keys() - kind.keys()):
        raise BadQuestion(f"{name}: '{unknown[0][:50]}' is not known; it has {', '.join(kind)}.")
    if missing := [one for one in NEEDED.get(name, ()) if one not in value]:
        raise BadQuestion(f"{name}: {missing[0]} is missing.")
    may_be_null = {"question": ("cache",), "sampling": ("last_step",)}.get(name, ())
    return {one: None if of is None and one in may_be_null else _checked(one, of, kind[one]) for one, of in value.items()}


MOST_BYTES = 16 * 1024  # the largest size of a question


async def _text_of(request):
    """Return the text of a request's body. Raises BadQuestion if it is longer than `MOST_BYTES`, or not UTF-8."""
    body = b""
    async for part in request.content.iter_chunked(MOST_BYTES):
        body += part
        if len(body) > MOST_BYTES:
            raise BadQuestion(f"question: it is longer than {MOST_BYTES // 1024} KB.")
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise BadQuestion("question: it is not UTF-8.") from None


class Planner:
    """Answers questions in a separate thread, one after the other, with at most one pending question per client.

    A rehearsal of many steps takes a moment. Meanwhile the server must answer other requests, and the time is taken from the
    running prompt.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "iec-step-plan")
        self._asking = set()  # addresses of clients with a pending question

    async def answer(self, request):
        """Return the response to a POST /iec/step_plan.

        The status is 400 if the question is malformed, and 429 while another question of the client is pending. Both have the
        body {"unknown": sentence}.
        """
        client = request.remote
        try:
            question = read_question(await _text_of(request))
        except BadQuestion as error:
            return web.json_response({"unknown": str(error)}, status=400)
        if client in self._asking:
            return web.json_response({"unknown": "Another step plan is being made; ask again when it is ready."}, status=429)
        self._asking.add(client)
        plan = self._thread.submit(_answer, question)
        plan.add_done_callback(lambda _: self._asking.discard(client))  # only then, even if the client has disconnected
        return web.json_response(await asyncio.wrap_future(plan))


def serve_step_plans(server):
    """Let a server, the host's PromptServer, answer POST /iec/step_plan for the frontend extension."""
    if any(getattr(route, "path", None) == ROUTE for route in server.routes):  # a second such route would stop the server
        return
    planner = Planner()

    @server.routes.post(ROUTE)
    async def answer_plan(request):
        return await planner.answer(request)
