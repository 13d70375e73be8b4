"""What the documents refer to: links, headings and files of the repository that are there."""

import re

import pytest
from comfyui import ROOT

FOLDERS = ("docs", "docs/results", "docs/gpu", "web/docs", "example_workflows", "example_workflows/api", "tools", "tests")
DOCUMENTS = sorted(path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.md"))
WRITTEN = {"output", "models", "custom_nodes"}  # folders of files that a run or a user writes, as are tables without a folder
NAMES = {
    path.name for path in ROOT.rglob("*.*") if not {".venv", ".cache", ".git", "output"} & set(path.relative_to(ROOT).parts)
}


def anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them: the second of equal headings ends in -1."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings)
    found = []
    for heading in plain:
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        before = sum(one == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", one) is not None for one in found)
        found.append(f"{anchor}-{before}" if before else anchor)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_existing_pages_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = document if not file else document.parent / file
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`([\w./-]+\.(?:py|js|md|csv|json|toml|txt|ini|yml))`", text):
        is_path = "/" in name
        if name.split("/")[0] in WRITTEN or (not is_path and name.endswith((".csv", ".json"))):
            continue
        assert (ROOT / name).exists() or (document.parent / name).exists() or (not is_path and name in NAMES), name
