"""ComfyUI's frontend in Chromium, on a server with the pack. Where there is no Chromium, these tests fail."""

import re

import comfyui
import frontend as frontend_tool
import pytest

SCREENSHOTS = comfyui.ROOT / "output" / "browser"


@pytest.fixture(scope="package")
def view(shared_server):
    """The Frontend, still to be loaded, that the tests of this folder share in a process.

    Not longer than that: while Playwright is on, its event loop runs, and the tests in `host` need their own.
    """
    with frontend_tool.in_browser(shared_server) as view:
        yield view


@pytest.fixture
def vue_nodes():
    """Whether the page is loaded with Nodes 2.0; a parameter of this name sets it, and spares the work of loading twice."""
    return False


@pytest.fixture
def settings():
    """More of the user's settings that the page is loaded with, set likewise."""
    return {}


@pytest.fixture
def frontend(view, request, vue_nodes, settings):
    """The Frontend (`server`, `page`, `errors`, `load`, `open` …) with an empty graph, on the classic canvas or Nodes 2.0.

    The test ends with a screenshot in output/browser, and fails if anything has failed in the page.
    """
    view.load(vue_nodes, settings)
    yield view
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", request.node.name)
    view.page.screenshot(path=SCREENSHOTS / f"{name}.png")
    assert view.errors == []
