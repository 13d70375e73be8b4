"""Check a workflow in the form that the frontend saves against the server's description of its nodes."""

NOTES = ("MarkdownNote", "Note")
CONTROLS = ("fixed", "increment", "decrement", "randomize")
SEEDS = ("seed", "noise_seed")  # the frontend adds a control to inputs of these names
WIDGETS = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,), "COMBO": (str, int, float)}


def _inputs(definition):
    """Return {name: (type, options)} of a node's inputs in order, from /object_info; a combo's type is COMBO."""
    found = {}
    for kind in ("required", "optional"):
        for name, (type_, *options) in definition["input"].get(kind, {}).items():
            options = dict(options[0]) if options else {}
            if isinstance(type_, list):  # older hosts
                type_, options["options"] = "COMBO", type_
            found[name] = (type_, options)
    return found


def _is_widget(type_, options):
    return type_ in WIDGETS and not options.get("forceInput")


def _value_problems(where, value, type_, options):
    """Yield what is wrong with a widget's value."""
    kinds = WIDGETS[type_]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        yield f"{where}: {value!r} is no {type_}"
    elif type_ == "COMBO" and value not in options["options"]:
        yield f"{where}: {value!r} is no choice"
    elif type_ in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        yield f"{where}: {value} is out of bounds"


def _widget_problems(node, inputs):
    """Yield what is wrong with a node's widget values, which are in the order of the inputs."""
    values = list(node.get("widgets_values", []))
    for name, (type_, options) in inputs.items():
        if not _is_widget(type_, options):
            continue
        where = f"{node['type']}.{name}"
        if not values:
            yield f"{where}: no value"
            return
        yield from _value_problems(where, values.pop(0), type_, options)
        if options.get("control_after_generate") or name in SEEDS:
            control = values.pop(0) if values else None
            if control not in CONTROLS:
                yield f"{where}: {control!r} is no control after generate"
        if options.get("image_upload") and (not values or values.pop(0) != "image"):
            yield f"{where}: no value of its upload button"
    if values:
        yield f"{node['type']}: {values} are values of no widget"


def _input_problems(node, inputs, required):
    """Yield what is wrong with a node's input slots."""
    slots = {slot["name"]: slot for slot in node.get("inputs", [])}
    for name, slot in slots.items():
        if slot["type"] == "IMAGEUPLOAD" and any(options.get("image_upload") for _, options in inputs.values()):
            continue  # the button that the frontend adds
        if name not in inputs:
            yield f"{node['type']}.{name}: no such input"
        elif slot["type"] != inputs[name][0]:
            yield f"{node['type']}.{name}: is a {inputs[name][0]}, not a {slot['type']}"
    for name in required:
        linked = name in slots and slots[name].get("link") is not None
        if not linked and not _is_widget(*inputs[name]):
            yield f"{node['type']}.{name}: not connected"


def _link_problems(workflow, info):
    """Yield what is wrong with the links, [id, from, its slot, to, its slot, type]."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    known = set()
    for number, source, out, target, into, type_ in workflow["links"]:
        known.add(number)
        if source not in nodes or target not in nodes:
            yield f"link {number}: leads from or to no node"
            continue
        gives, slots = info[nodes[source]["type"]]["output"], nodes[target]["inputs"]
        if out >= len(gives) or into >= len(slots) or slots[into].get("link") != number:
            yield f"link {number}: leads from or to no slot"
            continue
        given = "COMBO" if isinstance(gives[out], list) else gives[out]
        if slots[into]["type"] not in (given, "*") or type_ not in (given, slots[into]["type"]):
            yield f"link {number}: from a {given} to a {slots[into]['type']}, and it says {type_}"
    for node in workflow["nodes"]:
        for slot in node.get("inputs", []):
            if slot.get("link") is not None and slot["link"] not in known:
                yield f"{node['type']}.{slot['name']}: link {slot['link']} does not exist"


def problems(workflow, info):
    """Return what is wrong with the workflow, a list of sentences. info: the answer of GET /object_info."""
    nodes = [node for node in workflow["nodes"] if node["type"] not in NOTES]
    unknown = [f"{node['type']}: no such node" for node in nodes if node["type"] not in info]
    if unknown:
        return unknown
    found = []
    for node in nodes:
        definition = info[node["type"]]
        inputs = _inputs(definition)
        found += _input_problems(node, inputs, definition["input"].get("required", {}))
        found += _widget_problems(node, inputs)
    return found + list(_link_problems(workflow, info))
