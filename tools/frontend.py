"""Run ComfyUI's real frontend in Chromium.

    python tools/frontend.py       print the path of Chromium, installing it first if needed

Chromium is the one that the environment variable CHROMIUM names, else one on PATH, else one that apt (Debian and Ubuntu, as
root or through `sudo -n`) or Playwright installs.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import comfyui
import filelock
import matplotlib
import requests
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEWPORT = {"width": 1600, "height": 1000}

# A returning user's settings: no tutorial, templates dialog, release notes or toasts over the graph, and a canvas that always
# looks the same.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.AutoSave": "off",
    "Comfy.Window.UnloadConfirmation": False,
    "Comfy.Workflow.ShowMissingNodesWarning": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Locale": "en",
}
DISMISSED = "for (const key of ['vueNodesBannerDismissed', 'comfy.vueNodesMigration.dismissed']) localStorage[key] = 'true';"
# The frontend also requests files that do not exist (for example a new user's). That is an error only for these paths.
OF_THE_PACK = (f"/extensions/{comfyui.PACK}/js", f"/extensions/{comfyui.PACK}/docs/images", "/iec/")
# Console errors of the frontends without the pack: at start, about parts that do not exist yet (the last one in frontend
# 1.32.9, about a setting), and when a subgraph is made, about parts that no longer exist.
OWN_COMPLAINTS = (
    "ComfyApp graph accessed before initialization",
    "Attempted to cleanup event listeners for graph that was never set up",
    "TypeError: Cannot read properties of undefined (reading 'id')\n    at onChange ",
)
# fontconfig's file of `only_dejavu`: every text is in DejaVu Sans, unless a fixed-width or serif font is asked for.
FONTS = """<?xml version="1.0"?>
<fontconfig>
  <dir>{folder}</dir>
  <cachedir>{folder}/cache</cachedir>
  <alias binding="same"><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
  <alias binding="same"><family>serif</family><prefer><family>DejaVu Serif</family></prefer></alias>
  <match><edit name="family" mode="append_last"><string>DejaVu Sans</string></edit></match>
</fontconfig>
"""
# No name is resolved. Refusing requests one by one instead would disable the browser's cache.
ONLY_LOOPBACK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
# A frontend that keeps drafts opens a draft's workflow by itself; a workflow that is opened earlier would be replaced.
READY = """() => window.app?.graph && window.app.vueAppReady && window.app.extensions.length > 0 && (
    !app.extensionManager.setting.get("Comfy.Workflow.Persist") || !!app.extensionManager.workflow.activeWorkflow
)"""
# Open an empty workflow, and return after its first drawing whether it stays empty: a draft of an earlier page can replace it.
OPEN_BLANK = """async () => {
    await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    return app.graph.nodes.length === 0;
}"""


def _on_path():
    """Return the path of a Chromium on PATH that runs, or None."""
    for name in NAMES:
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:  # snap's stub fails here
            return path
    return None


def _install_by_apt():
    """Install Debian's or Ubuntu's Chromium; return its path, or None if that is not possible."""
    if not shutil.which("apt-get"):
        return None
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if root and not shutil.which("sudo"):
        return None
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        command = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", *arguments]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            return None
    return _on_path()


def _install_by_playwright():
    """Install Playwright's Chromium, and its system packages if allowed; return its path, or None."""
    if subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], stdout=sys.stderr).returncode:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if pathlib.Path(path).is_file() else None


def chromium():
    """Return the path of Chromium, installing it if it is missing. Raises RuntimeError if that fails.

    One process installs at a time, because package managers do not wait for each other.
    """
    named = os.environ.get("CHROMIUM")
    if named and not shutil.which(named):
        raise RuntimeError(f"CHROMIUM names {named}, which is no program; name Chromium's.")
    if path := named or _on_path():
        return path
    with filelock.FileLock(comfyui.CACHE / "chromium.lock"):
        if path := _on_path() or _installed():
            return path
    raise RuntimeError(
        "Chromium: none is on PATH, and neither apt nor Playwright could install one; install it, or name it in CHROMIUM."
    )


def _installed():
    """Install Chromium by the first method that works; return its path, or None."""
    print("Installing Chromium, for the tests in the browser ...", file=sys.stderr)
    return _install_by_apt() or _install_by_playwright()


def only_dejavu(folder):
    """Return the environment in which Chromium (on Linux) finds only DejaVu's fonts, which matplotlib brings along.

    What a page measures and shows is then the same on every machine. DejaVu Sans is the widest of the usual fonts: a text that
    fits in DejaVu Sans also fits in the other fonts. folder: an empty folder for the fonts.
    """
    for font in pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"):
        shutil.copy(font, folder)
    file = pathlib.Path(folder, "fonts.conf")
    file.write_text(FONTS.format(folder=folder))
    return {**os.environ, "FONTCONFIG_FILE": str(file)}


class Frontend:
    """The frontend of a running server in a browser page.

    server: the Server of tools/server.py. page: a Playwright page (sync). errors: texts of the uncaught exceptions and console
    errors since the page was loaded.
    """

    def __init__(self, server, page):
        self.server, self.page, self.errors = server, page, []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(f"uncaught: {error.stack or error}"))

    def _on_console(self, message):
        is_missing_file = message.text.startswith("Failed to load resource")
        is_own = not any(place in message.location["url"] for place in OF_THE_PACK) if is_missing_file else False
        if message.type == "error" and not is_own and not message.text.startswith(OWN_COMPLAINTS):
            self.errors.append(message.text)

    def load(self, vue_nodes=False, settings=None):
        """Reload the frontend, and return when it has all extensions and an empty graph.

        vue_nodes: Nodes 2.0 instead of the classic canvas. settings: more of the user's settings, by id. Raises RuntimeError if
        the frontend is not installed, or does not start within two minutes.
        """
        settings = {**SETTINGS, "Comfy.VueNodes.Enabled": vue_nodes, **(settings or {})}
        requests.post(f"{self.server.url}/settings", json=settings, timeout=60).raise_for_status()
        self.errors.clear()
        try:
            self.page.goto(self.server.url, timeout=120_000)
            self.page.wait_for_function(READY, timeout=120_000)
        except PlaywrightTimeout as error:
            raise RuntimeError(f"the frontend at {self.server.url} did not come up: {error}") from error
        self.page.evaluate("() => document.fonts.ready.then(() => null)")
        self._open_blank()

    def _open_blank(self):
        for _ in range(10):
            if self.page.evaluate(OPEN_BLANK):
                return
        raise RuntimeError(f"the frontend at {self.server.url} opens no empty workflow")

    def open(self, workflow, name="workflow"):
        """Open a workflow that is in the form that the frontend saves."""
        self.page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [workflow, name])

    def open_api(self, workflow, name="workflow"):
        """Open a workflow in API form; the frontend places its nodes."""
        self.page.evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [workflow, name])

    def prompt(self):
        """Return the open workflow in API form, as the frontend would queue it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def api_workflow(self):
        """Return the open workflow in API form, without the inputs that only the frontend's widgets have."""
        info, workflow = self.server.get("/object_info"), self.prompt()
        for node in workflow.values():
            known = {name for kind in info[node["class_type"]]["input"].values() for name in kind}
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
        return workflow


@contextlib.contextmanager
def in_browser(server, viewport=None, scale=1):
    """Yield a Frontend of a Server, not yet loaded, with access to this machine only.

    Its fonts are DejaVu's and the frontend's own. viewport: {"width", "height"}; scale: device pixels per pixel of the
    viewport. Raises RuntimeError if there is no Chromium.
    """
    with tempfile.TemporaryDirectory() as fonts, sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--font-render-hinting=none", "--force-color-profile=srgb", ONLY_LOOPBACK]
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments, env=only_dejavu(fonts))
        try:
            context = browser.new_context(viewport=viewport or VIEWPORT, device_scale_factor=scale, reduced_motion="reduce")
            context.add_init_script(DISMISSED)
            yield Frontend(server, context.new_page())
        finally:
            browser.close()


@contextlib.contextmanager
def show(server, vue_nodes=False, settings=None, viewport=None, scale=1):
    """Yield the loaded Frontend of a Server: no dialogs and an empty graph.

    vue_nodes, settings: as in Frontend.load. viewport, scale: as in in_browser. Raises RuntimeError if there is no Chromium or
    the frontend does not start.
    """
    with in_browser(server, viewport, scale) as view:
        view.load(vue_nodes, settings)
        yield view


if __name__ == "__main__":
    try:
        print(chromium())
    except RuntimeError as error:
        sys.exit(str(error))
