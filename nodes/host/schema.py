"""Node schemas with only the fields that this version of the host has."""

import dataclasses

from comfy_api.latest import io

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(search_aliases, **fields):
    """Return a node's io.Schema of these fields. search_aliases: further words by which the node search finds the node.

    Hosts before 2026 search names only and have no such field: there the aliases are left out.
    """
    if "search_aliases" in _KNOWN:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)
