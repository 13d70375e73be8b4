"""ComfyUI's frontend in Chromium, on a server with the pack. Where there is no Chromium, these tests fail."""

import re

import comfyui
import dummy_models
import frontend as frontend_tool
import pytest
import server

SCREENSHOTS = comfyui.ROOT / "output" / "browser"


@pytest.fixture(scope="package")
def view(tmp_path_factory):
    """The Frontend, still to be loaded, that the tests of this folder share in a process, on a server with the model files that
    the example workflows name.

    Not longer than that: while Playwright is on, its event loop runs, and the tests in `host` need their own.
    """
    models = dummy_models.write(tmp_path_factory.mktemp("models"))
    with server.serve(tmp_path_factory.mktemp("output"), models=models) as host, frontend_tool.in_browser(host) as view:
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
