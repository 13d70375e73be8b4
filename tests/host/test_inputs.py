"""Every input of every node takes its valid values, and refuses all others in a sentence that names the input."""

import json
import math
import re
import sys

import pytest
import requests
import server
import torch

# Values that a client may send for any input. A list is a link; these links lead nowhere.
ANY = [
    None,
    {},
    {"a": 1},
    [],
    [1],
    [1, 2, 3],
    ["nowhere", 0],
    ["model", 99],
    ["model", "0"],
    [["model"], 0],
    {"__value__": None},
]
NO_NUMBERS = [math.nan, math.inf, -math.inf, True, "", "x", "nan", "-Infinity", "x" * 300, "全部", {"__value__": [1]}]
WRONG = {
    "INT": [*NO_NUMBERS, 3.7, "3.7", 1e308, 10**400, -(10**400)],
    "FLOAT": [*NO_NUMBERS, 1e308, -1e308, 10**400],
    "BOOLEAN": ["false", "true", "False", "", 2, -1, 0.5, math.nan, {"__value__": "false"}],
    "STRING": [True, math.nan, math.inf, {"__value__": []}],
    "COMBO": ["", "x", True, 77, 0.5, math.nan, "x" * 300, "全部", "../../x", "..\\x", "con"],
}
# Texts that are not valid for an input; a label and the names of layers can be any text.
NO_FORMS = ["", "x", "x" * 300, "全部", "../x", "null", "true", "nan", "steps:", "1e400", "all,none"]
NO_NAMES = [
    "", " ", ".", "..", "../x", "..\\x", "/x", "\\x", "a/../x", "a//x", "c:x", "x" * 300, "字" * 120, "con", "NUL.safetensors",
    "aux.x", "a/Com1", "lpt9", "x.", "x ", ".x", "a\nb", "a\0b", 'a"b', "a|b", "a?b", "a*b", "<a>",
]  # fmt: skip
TEXTS = {
    "correction_steps": NO_FORMS, "lambdas": [text for text in NO_FORMS if text], "schedule": NO_FORMS,
    "labels": [text for text in NO_FORMS if text], "name": NO_NAMES, "label": [], "include": [], "exclude": [],
}  # fmt: skip
PYTHON = re.compile(
    r"Error\b|Traceback|<class|object has no|NoneType|invalid literal|unhashable|could not convert|<function|0x"
)


@pytest.fixture(scope="module")
def ours(shared_server):
    """Return {node: {input: (type, options)}} of the pack."""
    info = shared_server.get("/object_info")
    return {
        name: {
            key: (kind if isinstance(kind, str) else "COMBO", about[0] if about else {})
            for group in ("required", "optional")
            for key, (kind, *about) in node["input"].get(group, {}).items()
        }
        for name, node in info.items()
        if name.startswith("IEC")
    }


# The nodes that the sockets are wired to.
SOURCES = {
    "MODEL": ["model", 0], "CONDITIONING": ["label", 0], "LATENT": ["latent", 0], "VAE": ["vae", 0], "SAMPLER": ["select", 0],
    "IEC_REPORT": ["run", 1], "IEC_CACHE_PROFILE": ["cache_profile", 0], "IEC_QUANTIZATION_PROFILE": ["scales", 1],
}  # fmt: skip


def made_of(ours):
    """Return make(node, **inputs), which gives the node in a prompt, with its inputs' defaults and sockets wired."""

    def make(node, **inputs):
        values = {}
        for key, (kind, about) in ours[node].items():
            value = SOURCES.get(kind, about.get("default"))
            values[key] = (about.get("options") or ["none"])[0] if value is None else value
        return {"class_type": node, "inputs": {**values, **inputs}}

    return make


def sources(make):
    """Return the nodes of SOURCES."""
    few = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    nodes = {
        "model": make("IECLoadBuiltinModel"),
        "label": make("IECClassLabel"),
        "latent": {"class_type": "EmptyChromaRadianceLatentImage", "inputs": {"width": 32, "height": 32, "batch_size": 1}},
        "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}},
        "select": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "run": make("IECKSampler", **few, correction_steps="none"),
        "quantized": make("IECQuantizeModel"),
        "cache_profile": make("IECCalibrateCacheQuant", **few, runs=1),
        "scales": make("IECCalibrateQuantization", **few, runs=1, model=["quantized", 0]),
    }
    return nodes


def shown(name, source):
    return {f"{name} shown": {"class_type": "PreviewAny", "inputs": {"source": [source, 0]}}}


def wrong_values(name, kind, about):
    yield from ANY
    if kind in SOURCES:
        yield from [0, 1.5, True, "", "model", math.nan]
    yield from WRONG.get(kind, [])
    if kind in ("INT", "FLOAT"):
        gap = max(about["max"] - about["min"], 1) / 1000
        yield from [about["min"] - gap, about["max"] + gap] if kind == "FLOAT" else [about["min"] - 1, about["max"] + 1]
    if kind == "STRING":
        yield from TEXTS[name]


def post(host, prompt):
    return requests.post(f"{host.url}/prompt", data=json.dumps({"prompt": prompt}), timeout=120)


def test_wrong_values_of_every_input_are_refused_at_validation(shared_server, ours):
    """For each node, a prompt has one copy of the node per wrong value; the server still works after all prompts."""
    make = made_of(ours)
    around, wrong = sources(make), []
    assert len(ours) > 20
    for node, inputs in ours.items():
        prompt, asked = dict(around), {}
        for name, (kind, about) in inputs.items():
            for number, value in enumerate(wrong_values(name, kind, about)):
                one = f"{name} {number}"
                asked[one] = name, value
                prompt |= {one: make(node, **{name: value}), **shown(one, one)}
        answer = post(shared_server, prompt)
        errors = answer.json()["node_errors"]
        for one, (name, value) in asked.items():
            said = [f"{error['message']}: {error['details']}" for error in errors.get(one, {"errors": []})["errors"]]
            named = any(name in sentence for sentence in said)
            if not named or any(PYTHON.search(sentence) for sentence in said):
                wrong.append((node, name, value, said))
        assert wrong or answer.status_code == 400
    assert not wrong, "\n".join(str(one)[:300] for one in wrong)
    good = {**around, **shown("good", "run")}
    assert shared_server.run({key: good[key] for key in ("model", "label", "latent", "run", "good shown")})


def test_valid_values_in_other_forms_are_accepted(shared_server, ours):
    """Such values are a number as text, a whole number with a decimal point, 0 and 1 for a switch; and any text for a label."""
    make = made_of(ours)
    few = {"steps": "1", "cfg": "1", "seed": 7.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1}
    for number, label in enumerate(["", "x" * 300, "全部 🙂", "../con", "NaN", 5]):
        prompt = {
            **sources(make),
            "run": make("IECKSampler", **few, correction_steps=" FIRST:1 ", keep_latents=number % 2, label=label),
            "report": {"class_type": "IECReport", "inputs": {"report": ["run", 1]}},
        }
        prompt = {key: prompt[key] for key in ("model", "label", "latent", "run", "report")}
        (told,) = json.loads(shared_server.run(prompt)["report"]["text"][0])
        assert (told["label"], told["correction"], len(told["steps"])) == (str(label) or "run", "first:1", 1)


def test_wrong_numbers_over_links_are_refused_in_one_sentence(shared_server, ours):
    """The host does not check values that come over a link; the node does, and the next prompt works."""
    make = made_of(ours)
    base = sources(make)
    bad = {"INT": ("PrimitiveInt", sys.maxsize), "FLOAT": ("PrimitiveFloat", math.nan)}
    tried = 0
    for node, inputs in ours.items():
        for name, (kind, _) in inputs.items():
            if kind not in bad or name == "seed":
                continue
            primitive, value = bad[kind]
            number = {"class_type": primitive, "inputs": {"value": value}}
            prompt = {**base, "number": number, "one": make(node, **{name: ["number", 0]}), **shown("one", "one")}
            needed = {key: prompt[key] for key in (*base, "number", "one", "one shown")}
            with pytest.raises(server.Failed, match=rf"^\S* ?.*\b{name}: ") as failure:
                shared_server.run(needed)
            assert not PYTHON.search(str(failure.value).replace("ValueError", "")), failure.value
            tried += 1
    assert tried > 25


def test_values_after_a_malformed_node_are_checked(host):
    """A malformed node in a prompt must not stop the check of the others, because some hosts run the nodes that do not depend
    on it.
    """
    node = host.nodes["IECKSampler"]
    prompt = {
        "odd": {"class_type": "IECKSampler", "inputs": None}, "other": 3,
        "bad": {"class_type": "IECKSampler", "inputs": {"steps": 3.7, "model": ["odd", 0]}},
    }  # fmt: skip
    node.execute.__func__.__globals__["refuse_unfit"](prompt, {"IECKSampler": node})
    with pytest.raises(ValueError, match=r"^steps: 3\.7 is not a whole number"):
        int(prompt["bad"]["inputs"]["steps"])
    assert prompt["bad"]["inputs"]["model"] == ["odd", 0]


# Valid inputs with an odd size or number.


@pytest.mark.parametrize(
    "inputs",
    [
        {"max_iterations": 0, "sampler_name": "euler_cfg_pp", "correction_steps": "all"},
        {"max_iterations": 0, "steps": 4, "correction_steps": "steps:7"},
        # 247 steps: the scheduler takes each timestep once
        {"scheduler": "beta", "steps": 250, "lambdas": ",".join(["0.5"] * 247), "correction_steps": "all"},
    ],
)
def test_valid_inputs_are_not_refused_at_validation(host, inputs):
    given = {"steps": 20, "sampler_name": "euler", "scheduler": "normal", "lambda_": 0.5, "max_iterations": 1, **inputs}
    assert host.nodes["IECKSampler"].validate_inputs(**given) is True


def test_the_largest_seed_has_a_next_one(host, model, monkeypatch):
    """Each run of a calibration has its own seed."""
    import comfy.sample

    seeds = []
    monkeypatch.setattr(comfy.sample, "sample", lambda *args, seed, **more: seeds.append(seed) or args[1])
    taken_runs = host.nodes["IECCalibrateCacheQuant"].run.__func__.__globals__["taken_runs"]
    latent, sampling = {"samples": torch.zeros(1, 3, 8, 8)}, {"steps": 1, "cfg": 1.0}
    taken_runs.__globals__["Runs"]([[]], [], latent, 2**64 - 1, 3, sampling).sample(None, model)
    assert seeds == [2**64 - 1, 0, 1]


def test_the_fingerprint_of_a_linked_file_name_is_empty(host):
    """The host asks with None; an error would make all nodes after it run again with every prompt."""
    for name in ("IECLoadCacheProfile", "IECLoadQuantizationProfile"):
        assert host.nodes[name].fingerprint_inputs(profile_name=None) == ""
    assert host.nodes["IECLoadQuantizedModel"].fingerprint_inputs(model_name=None) == ""


def test_an_unknown_input_is_reported(host):
    with pytest.raises(ValueError, match=r"^more: this node has no such input; it has precision, architecture\."):
        host.run("IECLoadBuiltinModel", precision="auto", more=1)


def test_every_node_checks_linked_values(host):
    """The node is called as the host calls it, with one value that is not in the input's type, bounds or choices."""
    nodes = {name: node for name, node in host.nodes.items() if name.startswith("IEC")}
    for node in nodes.values():
        for spec in node.define_schema().inputs:
            for value in [None, {}, *WRONG.get(spec.get_io_type(), [])] if spec.get_io_type() in WRONG else []:
                if isinstance(value, dict) and "__value__" in value:
                    continue
                with pytest.raises(ValueError, match=rf"^{spec.id}: "):
                    node.execute(**{spec.id: value})
