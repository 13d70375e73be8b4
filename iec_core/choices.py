"""Validation of inputs that take one of several words. Hosts before 2026 do not check those of V3 nodes, so the nodes do."""


def unknown_choice(options, **values):
    """Return the sentence for the first of `values` that is not among `options`, else None.

    A value that is None comes over a link and is not known yet.
    """
    for name, value in values.items():
        if value is not None and value not in options:
            if not isinstance(value, str) and str(value) in options:
                return f'{name}: {value} is a number; write it as text, "{value}".'
            return f"{name}: '{value}' is none of {', '.join(options)}."
    return None
