"""The help pages in the panel of ComfyUI's frontend, at the panel's default width."""

import comfyui
import pytest

PAGES = sorted(path.stem for path in (comfyui.ROOT / "web/docs").glob("*.md"))
# Elements that extend over the panel's inner edge, or that are scrollable and have a hidden part.
CUT_OFF = """(panel) => {
    const right = panel.getBoundingClientRect().right - parseFloat(getComputedStyle(panel).paddingRight) + 1
    const wide = (part) => part.scrollWidth > part.clientWidth && getComputedStyle(part).display !== 'inline'
    const parts = [panel, ...panel.querySelectorAll('*')]
    const cut = parts.filter((part) => wide(part) || (part !== panel && part.getBoundingClientRect().right > right))
    return cut.map((part) => `${part.tagName} ${part.textContent.trim().slice(0, 60)}`)
}"""


@pytest.fixture
def shares_page():
    return "help"  # its panel stays open


def help_of(frontend, node):
    """Add a node, open its help as a user does, by the button over the selected node, and return the panel."""
    page = frontend.page
    frontend.open_api({"1": {"class_type": node, "inputs": {}}})
    page.evaluate("() => app.canvas.selectNode(app.graph.nodes[0])")
    button = page.locator("[data-testid=info-button]").first
    button.wait_for()
    button.dispatch_event("click")  # the button can be under the menu
    panel = page.locator(".node-help-content")
    panel.locator(f"img[src$='/{node}.png']").wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('.node-help-content img')].every((one) => one.naturalWidth)")
    return panel


def test_no_part_of_a_help_page_is_cut_off(frontend):
    cut = {}
    for node in PAGES:
        panel = help_of(frontend, node)
        assert panel.evaluate("(panel) => panel.clientWidth") < 400  # the default width, which is narrow
        assert panel.locator("li").count() >= 2, node
        cut[node] = panel.evaluate(CUT_OFF)
    assert len(cut) > 20 and {node: parts for node, parts in cut.items() if parts} == {}


def test_content_wider_than_the_help_panel_is_detected(frontend):
    panel = help_of(frontend, "IECKSampler")
    wide = "<table><tr><td><code>a_name_that_is_much_too_long_for_the_panel_and_has_no_break</code></td></tr></table>"
    panel.evaluate("(panel, wide) => panel.insertAdjacentHTML('beforeend', wide)", wide)
    assert any(part.startswith("TABLE") for part in panel.evaluate(CUT_OFF))
