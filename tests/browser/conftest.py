"""ComfyUI's frontend in Chromium, on a server with the pack. Without Chromium, these tests fail."""

import re

import comfyui
import frontend as frontend_tool
import pytest

SCREENSHOTS = comfyui.ROOT / "output" / "browser"


@pytest.fixture(scope="package")
def view(shared_server):
    """Return the Frontend, not yet loaded, that the tests of this folder share in a process.

    It is closed after this folder: while Playwright is active, its event loop runs, and the tests in `host` need their own.
    """
    with frontend_tool.in_browser(shared_server) as view:
        view.left = None  # settings of the loaded page that a test has left for the next one, if any
        yield view


@pytest.fixture
def vue_nodes():
    """Return whether the page is loaded with Nodes 2.0. Parametrize this name to change it; this avoids loading twice."""
    return False


@pytest.fixture
def settings():
    """Return more of the user's settings with which the page is loaded. Parametrize this name to change them."""
    return {}


@pytest.fixture
def shares_page():
    """Return False, or the name of a group of tests that share a loaded page.

    Such a test gets the page as the previous one left it, with an empty workflow opened, because loading takes longer than many
    tests. A module whose tests leave only open workflows sets it to "workflows". A module whose tests leave more, without
    affecting each other, sets it to a name of its own.
    """
    return False


@pytest.fixture
def fresh_page(view):
    """Load the page again for a test in such a module that needs a fresh page."""
    view.left = None


@pytest.fixture
def spoils_page(view):
    """Load the page again after a test in such a module that leaves more in it."""
    yield
    view.left = None


@pytest.fixture
def frontend(view, request, vue_nodes, settings, shares_page):
    """Return the Frontend (`server`, `page`, `errors`, `load`, `open` …) with an empty graph, on the classic canvas or Nodes
    2.0.

    The test ends with a screenshot in output/browser, and fails if the page had an error.
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
    if request.session.testsfailed == failed:  # a failed test may have left anything
        view.left = (vue_nodes, settings, shares_page)
