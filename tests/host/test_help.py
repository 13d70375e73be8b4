"""What a user reads at the node: its help page, tooltips, and the words with which the search finds it."""

import ast
import dataclasses
import re

import comfyui
import pytest

pytestmark = pytest.mark.fast

PAGES = comfyui.ROOT / "web/docs"
LARGEST_SEED = "2⁶⁴ \N{MINUS SIGN} 1"


def page_of(node):
    """Return the text of a node's help page."""
    return (PAGES / f"{node}.md").read_text(encoding="utf-8")


def section(text, title):
    """Return the text below a heading of the second level."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2])).get(title, "")


def entries(text):
    """Return {name: (the rest of its line, the text below)} of the list in a section; an entry can have several names.

    An entry is "- **`name`**: **range**, default, unit", or "- `message`", and its text on the lines below.
    """
    found = re.findall(r"^- ((?:\*\*)?`.*)\\\n((?:  .*\n?)+)", text, flags=re.MULTILINE)
    heads = [(*head.partition("**: ")[::2], below) if head.startswith("**") else (head, "", below) for head, below in found]
    return {name: (said, below) for head, said, below in heads for name in re.findall(r"`([^`]+)`", head)}


def numbers(text):
    """Return the numbers in a text."""
    text = text.replace(LARGEST_SEED, str(2**64 - 1))
    return {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)}


def words(text):
    """Return the choices that a cell lists."""
    return {word.strip(" `") for word in text.split(",")}


@pytest.fixture(scope="module")
def infos(host):
    """Return {node: the server's description for the page} of the pack's nodes."""
    return {name: cls.GET_NODE_INFO_V1() for name, cls in host.nodes.items() if name.startswith("IEC")}


def inputs_of(info):
    """Return {input: (type, options)} of a node, both required and optional inputs."""
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in given.items()}


def wrong_input(kind, options, said):
    """Return what is wrong in the line of an input, else None: "**range**, default …, unit", or the type of a connection."""
    if kind not in ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"):
        return None if said == f"`{kind}`" else f"{said}, and it is {kind}"
    parts = re.fullmatch(r"\*\*(?:one of )?(.+?)\*\*(?:[^*]*?), default (`[^`]*`|[^,]+)(?:, (.+))?", said)
    if not parts:
        return f"{said}, without a range or a default"
    range_, default, unit = parts[1], parts[2].strip("`"), parts[3]
    if kind in ("INT", "FLOAT"):
        if not {float(options["min"]), float(options["max"])} <= numbers(range_):
            return f"range {range_}, and it is {options['min']} to {options['max']}"
        if not unit:
            return "no unit, not even that there is none"
        return None if float(options["default"]) == float(default) else f"default {default}, and it is {options['default']}"
    if kind == "BOOLEAN":
        right = range_ == "on or off" and default == ("on" if options["default"] else "off")
        return None if right else f"{said}, and it is {options['default']}"
    if kind == "STRING":
        return None if default == (options["default"] or "empty") else f"default {default}, and it is {options['default']}"
    choices = options["options"]
    if range_.startswith("the files of"):
        return None if default == "the first" and "default" not in options else f"default {default}"
    is_hosts = range_.startswith("ComfyUI's") and "default" not in options
    if not is_hosts and words(range_) != set(choices):
        return f"range {range_}, and it is {choices}"
    first = options.get("default", choices[0])
    return None if default == first else f"default {default}, and it is {first}"


def test_every_page_has_a_node(infos):
    assert infos and {path.stem for path in PAGES.glob("*.md")} == set(infos)


def test_help_pages_begin_with_name_two_sentences_and_picture(infos):
    for node, info in infos.items():
        title, opening, picture, *_ = page_of(node).split("\n\n")
        assert title == f"# {info['display_name']}", node
        assert len(re.findall(r"\.(?=\s|$)", opening)) == 2 and len(opening.split()) <= 70, node
        assert picture == f"![{info['display_name']}](images/{node}.png)", node


def test_pictures_exist_and_are_small(infos):
    for node in infos:
        picture = (PAGES / "images" / f"{node}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) < 60_000, node


def test_inputs_have_ranges_defaults_units_and_a_text(infos):
    for node, info in infos.items():
        given = entries(section(page_of(node), "Inputs"))
        assert set(given) == set(inputs_of(info)), node
        for name, (kind, options) in inputs_of(info).items():
            said, text = given[name]
            assert wrong_input(kind, options, said) is None, (node, name)
            assert len(text.split()) > 1, (node, name)


def test_outputs_have_names_types_and_a_text(infos):
    for node, info in infos.items():
        given = entries(section(page_of(node), "Outputs"))
        types = {name: said.strip("`") for name, (said, _) in given.items()}
        assert types == dict(zip(info["output_name"], info["output"])), node
        assert all(len(text.split()) > 1 for _, text in given.values()), node


def test_inputs_of_the_same_meaning_are_described_alike():
    shared = ("correction_steps", "lambda_", "max_iterations", "tolerance", "evaluation_point", "lambda_mode", "lambdas")
    given = [entries(section(page_of(node), "Inputs")) for node in ("IECKSampler", "IECApply", "IECSampler")]
    for name in shared:
        assert given[0][name] == given[1][name] == given[2][name], name


def said_in(folder):
    """Return all texts in the code of a folder, with … for inserted values."""
    said = []
    for path in folder.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        composed = [node for node in nodes if isinstance(node, ast.JoinedStr)]
        parts = {id(part) for node in composed for part in node.values}
        said += ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values) for node in composed]
        alone = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in parts]
        said += [value for value in alone if isinstance(value, str)]
    return said


def not_said(message, said):
    """Return the parts of a message, split at inserted values, that the code does not say of that input or of any."""
    name, _, sentence = message.partition(": ") if ": " in message else ("", "", message)
    ours = "\n".join(text for text in said if text.startswith(f"{name}: ") or not re.match(r"[\w, ]+: ", text))
    parts = re.split(r"…|: |\b[NM]\b", re.sub(r"models/\w+", "models/…", sentence))
    return [part for part in (part.strip(" '") for part in parts) if len(part) > 3 and part not in ours]


def test_help_pages_quote_error_messages_from_the_code(infos):
    said = [*said_in(comfyui.ROOT / "nodes"), *said_in(comfyui.ROOT / "iec_core")]
    said.append((comfyui.provide() / "execution.py").read_text(encoding="utf-8"))
    for node in infos:
        messages = entries(section(page_of(node), "When something is refused"))
        assert messages, node
        assert {message: parts for message in messages if (parts := not_said(message, said))} == {}, node


def test_every_input_and_output_has_a_tooltip(infos):
    for node, info in infos.items():
        assert info["description"] and info["category"].endswith("/IEC"), node
        assert [name for name, (_, options) in inputs_of(info).items() if not options.get("tooltip")] == [], node
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), node


def test_search_finds_nodes_by_words_of_their_use(host, infos):
    from comfy_api.latest import io

    if "search_aliases" not in {field.name for field in dataclasses.fields(io.Schema)}:
        pytest.skip("this ComfyUI's node search has names only")
    for node, info in infos.items():
        aliases = info["search_aliases"]
        assert len(set(aliases)) == len(aliases) >= 2, node
    for word, node in (("int8", "IECQuantizeModel"), ("faster", "IECDeepCache"), ("error correction", "IECKSampler")):
        assert word in infos[node]["search_aliases"]
