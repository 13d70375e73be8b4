"""Type and range checks for the input values of the pack's nodes.

Values are checked twice: as the client wrote them, when a prompt arrives (`refuse_unfit_values`), and again before a node runs,
when the values that come over links are known (`CheckedNode`). The first check is needed because the host converts a value to
its input's type before a node sees it: null becomes the text "None", "false" becomes true, 3.7 becomes 3.
"""

import contextlib
import functools
import inspect
import json
import math
import numbers

import nodes as host_nodes
from comfy_api.latest import io

ASKED = {
    "INT": "a whole number",
    "FLOAT": "a finite number",
    "BOOLEAN": "true or false, without quotes",
    "STRING": "a text",
    "COMBO": "one of the choices, as text",
}


def _written(value):
    """Return a value as the client wrote it, cut to 60 characters for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = f"of the type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value):
    """Return a text or a finite number unchanged. Raises TypeError or ValueError for any other value."""
    if isinstance(value, bool) or not isinstance(value, (str, numbers.Real)):
        raise TypeError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value  # a choice that is given as a number is refused later by the node, whose message shows the right spelling


def _whole(value):
    number = int(_plain(value))
    if not isinstance(value, str) and number != value:
        raise ValueError
    return number


def _finite(value):
    return _plain(float(_plain(value)))


def _switch(value):
    if not isinstance(value, bool) and value not in (0, 1):
        raise ValueError
    return bool(value)


READ = {
    "INT": _whole,
    "FLOAT": _finite,
    "BOOLEAN": _switch,
    "STRING": lambda value: str(_plain(value)),
    "COMBO": _plain,
}


def _between(spec):
    """Return the bounds of a numeric input in words."""
    low, high = (value if isinstance(value, int) else f"{value:g}" for value in (spec.min, spec.max))
    return f"{low} to {high}"


def read(spec, value):
    """Return the value of a node's io.Input in the input's type.

    Raises ValueError, with a sentence that names the input, if the conversion would change the value: null, NaN, 3.7 for a
    whole number, "false" for a switch.
    """
    kind = spec.get_io_type()
    if kind not in READ:
        return value
    try:
        return READ[kind](value)
    except (ValueError, TypeError, OverflowError):
        where = f" from {_between(spec)}" if kind in ("INT", "FLOAT") else ""
        raise ValueError(f"{spec.id}: {_written(value)} is not {ASKED[kind]}{where}.") from None


def check_bounds(spec, value):
    """Raise ValueError, with a sentence, if a number is outside an io.Input's bounds."""
    if spec.get_io_type() in ("INT", "FLOAT") and not spec.min <= value <= spec.max:
        raise ValueError(f"{spec.id}: {value} is outside {_between(spec)}.")


class CheckedNode(io.ComfyNode):
    """A node whose `run` gets values in the types of their inputs, after they passed the bounds and `validate_inputs`."""

    @classmethod
    def execute(cls, **inputs):
        specs = {spec.id: spec for spec in cls.define_schema().inputs}
        if unknown := sorted(inputs.keys() - specs.keys()):
            raise ValueError(f"{unknown[0]}: this node has no such input; it has {', '.join(specs)}.")
        values = {name: read(specs[name], value) for name, value in inputs.items()}
        for name, value in values.items():
            check_bounds(specs[name], value)
        if (said := cls._validated(values)) is not True:
            raise ValueError(said)
        return cls.run(**values)

    @classmethod
    def _validated(cls, values):
        """Return True, or the error message of the node's `validate_inputs` for these values, if the node has that method."""
        if cls.validate_inputs.__func__ is io.ComfyNode.validate_inputs.__func__:
            return True
        named = inspect.signature(cls.validate_inputs).parameters
        return cls.validate_inputs(**{name: value for name, value in values.items() if name in named})


def known_values(check):
    """Decorate a node's `validate_inputs`: check bounds first, and pass None for values that are not known.

    A value is not known if it comes over a link or is refused for its type. The bounds must be checked here, because the host
    leaves all checks of the values that `validate_inputs` names to the node.
    """

    @functools.wraps(check)
    def validate_inputs(cls, **given):
        known = {name: None if isinstance(value, (list, Unfit)) else value for name, value in given.items()}
        try:
            for spec in cls.define_schema().inputs:
                known.get(spec.id) is None or check_bounds(spec, known[spec.id])
        except ValueError as refusal:
            return str(refusal)
        return check(cls, **known)

    validate_inputs.__signature__ = inspect.signature(check)  # the host reads from it which values to pass
    return validate_inputs


class Unfit(str):
    """A value that the host refuses at validation: its conversion to an input's type raises ValueError(sentence)."""

    def __new__(cls, text, sentence=""):
        unfit = super().__new__(cls, text)
        unfit.sentence = sentence
        return unfit

    def _refuse(self):
        raise ValueError(self.sentence)

    __str__ = __int__ = __float__ = __bool__ = _refuse

    def __format__(self, form):
        return format("".join(self), form)


def _is_link(value, prompt):
    """Return whether a list is a link to an output of a node in the prompt."""
    try:
        source, slot = value
        node = host_nodes.NODE_CLASS_MAPPINGS.get(prompt[source]["class_type"])
        # The host may still replace an unknown node, so that any slot may exist.
        return isinstance(slot, int) and 0 <= slot < (len(node.RETURN_TYPES) if node else math.inf)
    except (ValueError, TypeError, KeyError):
        return False


def _as_the_host_shall_see(spec, value, prompt):
    """Return the value of an input, or a value that the host refuses with a message."""
    if isinstance(value, list):
        return value if _is_link(value, prompt) else [value]  # [value] is refused: a link is a list of two
    if spec.get_io_type() not in READ:
        return [value]
    plain = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
    try:
        read(spec, plain)
    except ValueError as refusal:
        # The host does not convert a choice: it refuses the text because it is not one of the choices.
        return _written(plain) if spec.get_io_type() == "COMBO" else Unfit(_written(plain), str(refusal))
    return value


def refuse_unfit(prompt, pack):
    """Replace, in a client's prompt, the values that the pack's nodes cannot take by values that the host refuses.

    pack: {id: node class}.
    """
    for node in prompt.values() if isinstance(prompt, dict) else ():
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # the host reports a malformed node itself
            for spec in pack[node["class_type"]].define_schema().inputs if node["class_type"] in pack else ():
                if spec.id in node["inputs"]:
                    node["inputs"][spec.id] = _as_the_host_shall_see(spec, node["inputs"][spec.id], prompt)


def refuse_unfit_values(server, pack):
    """Check every prompt when it arrives at a server, the host's PromptServer. pack: as in `refuse_unfit`."""

    def on_prompt(body):
        refuse_unfit(body.get("prompt") if isinstance(body, dict) else None, pack)
        return body

    server.add_on_prompt_handler(on_prompt)
