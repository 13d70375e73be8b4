"""Validation of inputs that take one of several words. ComfyUI before 2026 does not check these inputs of V3 nodes."""

from collections.abc import Collection


def unknown_choice(options: Collection[str], **values: object) -> str | None:
    """Return a sentence on the first of `values` that is not in `options`; None where all are.

    A value of None is not checked: it comes over a link and is not known yet.
    """
    for name, value in values.items():
        if value is not None and value not in options:
            if not isinstance(value, str) and str(value) in options:
                return f'{name}: {value} is a number; write it as text, "{value}".'
            return f"{name}: '{value}' is none of {', '.join(options)}."
    return None
