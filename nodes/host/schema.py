"""A node's Schema, in what the host's version of it knows."""

import dataclasses

from comfy_api.latest import io

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(search_aliases, **fields):
    """Return a node's io.Schema of these fields. search_aliases: words by which the node search finds it too.

    Hosts before 2026 have no such words and search names only: there they are left out.
    """
    if "search_aliases" in _KNOWN:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)
