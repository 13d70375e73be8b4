"""The pack's metadata for package managers and ComfyUI's registry: pyproject.toml and requirements.txt."""

import importlib.metadata
import os
import re
import tomllib

import comfyui
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((comfyui.ROOT / "pyproject.toml").read_text())


def test_both_lists_of_requirements_are_the_same():
    lines = (comfyui.ROOT / "requirements.txt").read_text().split()
    assert PROJECT["project"]["dependencies"] == lines


def test_registry_fields_are_of_the_form_that_the_registry_wants():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z]+([-_.]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and comfy["PublisherId"] and comfy["DisplayName"]
    assert (comfyui.ROOT / project["license"]["file"]).is_file() and (comfyui.ROOT / project["readme"]).is_file()
    assert any(classifier.startswith("Operating System :: ") for classifier in project["classifiers"])


def test_the_oldest_comfyui_is_the_tested_and_required_version():
    asked = re.search(r'^OLDEST = "(.+?)"', (comfyui.ROOT / "nodes" / "host" / "version.py").read_text(), re.MULTILINE)[1]
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == f">={comfyui.VERSION}" == f">={asked}"


def listed(path):
    """Return the requirements that a file lists, one per line."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def needed(requirements):
    """Return the names of the distributions that requirements install here, including their own requirements."""
    names, waiting = set(), [(requirement, "") for requirement in requirements]
    while waiting:
        wanted, extra = waiting.pop()
        key = (canonicalize_name(wanted.name), *sorted(wanted.extras))
        if key in names or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        names.add(key)
        own = [Requirement(text) for text in importlib.metadata.distribution(wanted.name).requires or ()]
        waiting += [(requirement, of) for requirement in own for of in ("", *wanted.extras)]
    return {name for name, *_ in names}


def test_constraints_are_plain_versions():
    lines = [line for line in comfyui.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert lines == sorted(lines, key=str.lower)


@pytest.mark.skipif("COMFYUI_DIR" in os.environ, reason="a ComfyUI of one's own has requirements of its own")
def test_everything_that_the_set_up_installs_is_pinned():
    root = comfyui.ROOT
    files = (root / "requirements-dev.txt", root / "requirements.txt", comfyui.provide() / "requirements.txt")
    requirements = [Requirement(text) for text in (*comfyui.TORCH, "requests")]
    requirements += [requirement for file in files for requirement in listed(file)]
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in listed(comfyui.CONSTRAINTS)}
    installed = needed(requirements)
    assert len(installed) > 80
    assert {name for name in installed if name not in pins} == set()
    assert {name for name in installed if pins[name] != f"=={importlib.metadata.version(name).split('+')[0]}"} == set()


@pytest.mark.parametrize(
    "kept", ["__init__.py", "nodes", "iec_core", "web", "example_workflows", "requirements.txt", "LICENSE"]
)
def test_the_package_includes_everything_that_users_need(kept):
    left_out = (comfyui.ROOT / ".comfyignore").read_text().split()
    assert (comfyui.ROOT / kept).exists() and kept not in {line.strip("/") for line in left_out}
    assert all((comfyui.ROOT / line).exists() for line in left_out)
