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
        view.left = None  # what the page is loaded with that a test has left for the next one, if it has
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
def shares_page():
    """Whether the page is taken as another test that shares it has left it, with an empty workflow opened: loading takes longer
    than many a test. A module whose tests leave nothing but open workflows sets it to "workflows", one whose tests leave more
    that they do not mind among themselves to a name of its own.
    """
    return False


@pytest.fixture
def fresh_page(view):
    """For a test in such a module that needs a page as it is loaded."""
    view.left = None


@pytest.fixture
def spoils_page(view):
    """For a test in such a module that leaves more in it."""
    yield
    view.left = None


@pytest.fixture
def frontend(view, request, vue_nodes, settings, shares_page):
    """The Frontend (`server`, `page`, `errors`, `load`, `open` …) with an empty graph, on the classic canvas or Nodes 2.0.

    The test ends with a screenshot in output/browser, and fails if anything has failed in the page.
    """
    if shares_page and view.left == (vue_nodes, settings, shares_page):
        view.errors.clear()
        view.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        view.page.wait_for_function("() => app.graph.nodes.length + document.querySelectorAll('.iec').length === 0")
    else:
        view.load(vue_nodes, settings)
    view.left, failed = None, request.session.testsfailed
    yield view
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", request.node.name)
    view.page.screenshot(path=SCREENSHOTS / f"{name}.png")
    assert view.errors == []
    if request.session.testsfailed == failed:  # or it may have left anything
        view.left = (vue_nodes, settings, shares_page)
