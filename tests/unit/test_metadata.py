"""What package managers and ComfyUI's registry read of the pack: pyproject.toml and requirements.txt."""

import re
import tomllib

import comfyui
import pytest

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


def test_oldest_comfyui_is_the_one_that_is_tested():
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == f">={comfyui.VERSION}"


@pytest.mark.parametrize(
    "kept", ["__init__.py", "nodes", "iec_core", "web", "example_workflows", "requirements.txt", "LICENSE"]
)
def test_what_users_need_is_not_left_out_of_the_package(kept):
    left_out = (comfyui.ROOT / ".comfyignore").read_text().split()
    assert (comfyui.ROOT / kept).exists() and kept not in {line.strip("/") for line in left_out}
    assert all((comfyui.ROOT / line).exists() for line in left_out)
