"""Draw the example workflows and the nodes with ComfyUI's own frontend.

    python tools/draw_workflows.py [NAME ...]        workflows of these names, `nodes` or `readme`; default: everything

Reads `example_workflows/api/<name>.json`, arranges the nodes as `workflow_pages.py` says, and writes

- `example_workflows/<name>.json`, the workflow as the frontend saves it,
- `example_workflows/<name>.jpg`, its picture, with results if it runs on the built-in model,
- `example_workflows/api/<name>.json` again, with every widget's value,
- `web/docs/images/<node id>.png`, a picture of each node,
- `docs/images/quick_start.jpg` and `docs/images/grid.png`, the pictures of README.md (`readme`: two minutes).
"""

import argparse
import contextlib
import io
import json
import pathlib
import sys
import tempfile
import uuid

import comfyui
import demo
import frontend
import server
from PIL import Image
from workflow_pages import PAGES

WORKFLOWS = comfyui.ROOT / "example_workflows"
NODE_PICTURES = comfyui.ROOT / "web" / "docs" / "images"
README_PICTURES = comfyui.ROOT / "docs" / "images"
README_GROUPS = ("3. Corrected sampling", "4. Images")  # the groups of quick_start that README.md shows
MOST_BYTES = 60_000  # of a picture of an example workflow
MOST_BYTES_IN_README = 300_000

NOTE_WIDTH, PADDING, GAP, TITLE, FRAME_TITLE = 400, 20, 20, 30, 44
VIEWPORT = {"width": 1600, "height": 1200}
# The initial view of a workflow: its scale, and the position of its note, right of and below the frontend's bars, in pixels of
# the window.
VIEW_SCALE, BARS = 0.75, (90, 140)
# Sizes of nodes that show something or hold a text, by title or type; the other nodes have the minimum size of their widgets.
SIZES = {
    "CLIPTextEncode": (380, 150),
    "LoadImage": (380, 400),
    "SaveImage": (340, 400),
    "PreviewImage": (340, 400),
    "PreviewAny": (640, 720),
    "IECFindSettings": (620, 1270),
    "Verdict": (640, 130),
    "IECReport": (460, 420),
    "IECJoinReports": (480, 0),
    "IECCompare": (480, 300),
    "IECImageGrid": (560, 940),
    "IECErrorPlot": (560, 440),
    "IECParetoPlot": (560, 440),
}
LEAST_WIDTH, LEAST_NODE_WIDTH = 300, 340

# Hide everything except the canvas and what widgets put over it.
BARE = """
body * { visibility: hidden !important; }
#graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }
"""
SETTINGS = {"LiteGraph.Canvas.MinFontSizeForLOD": 0, "Comfy.NodeBadge.NodeSourceBadgeMode": "None"}
SCRIPT = pathlib.Path(__file__).with_suffix(".js")


def api_workflow(name):
    """Return an example workflow in API form."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def write_json(path, data):
    """Write JSON in the format of the repository's files."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def call(view, function, *arguments):
    """Call a function of draw_workflows.js in the page and return its result."""
    return view.page.evaluate("([name, given]) => iecDraw[name](...given)", [function, arguments])


def load(view):
    """Reload the frontend, with only the canvas visible, and with texts drawn at every scale."""
    view.load(settings=SETTINGS)
    view.page.add_style_tag(content=BARE)
    view.page.add_script_tag(path=SCRIPT)


def arrange(page, sizes):
    """Return ({title: (x, y, width, height)} of the nodes, [(x, y, width, height)] of the page's groups).

    sizes: {title: (width, height, room below)}. Positions are LiteGraph's: a node's position is below its title. Groups stand
    in columns, and nodes in columns within a group; all nodes of a column have one width, and so have all groups of a column.
    """
    nodes, frames, left = {}, [], 0
    for column in page.columns:
        widths = [sum(max(sizes[t][0] for t in titles) + PADDING for titles in group.columns) + PADDING for group in column]
        top = 0
        for group in column:
            x, bottom = left + PADDING, top
            spare = (max(widths) - widths[column.index(group)]) / len(group.columns)
            for titles in group.columns:
                width, y = max(sizes[title][0] for title in titles) + spare, top + FRAME_TITLE + TITLE
                for title in titles:
                    _, height, room = sizes[title]
                    nodes[title] = (round(x), round(y), round(width), height)
                    y += height + room + GAP + TITLE
                x += width + PADDING
                bottom = max(bottom, y - GAP - TITLE + PADDING)
            frames.append((left, top, round(max(widths)), round(bottom - top)))
            top = bottom + GAP
        left += max(widths) + GAP
    return nodes, frames


def decorate(view, name, page):
    """Place the nodes of the open workflow, and add the note and the groups."""
    sizes = call(view, "measure", SIZES, LEAST_WIDTH)
    if sorted(sizes) != sorted(title for group in page.groups for title in group.nodes):
        raise ValueError(f"{name}: workflow_pages.py does not name its nodes' titles, each once: {', '.join(sorted(sizes))}")
    nodes, frames = arrange(page, sizes)
    call(view, "place", nodes, comfyui.PACK)
    for group, frame in zip(page.groups, frames):
        call(view, "addGroup", group.title, group.color, frame)
    call(view, "addNote", "About this workflow", page.note.strip(), NOTE_WIDTH, GAP)


def serialized(view, name):
    """Return the open workflow as the frontend saves it, without the parts that differ from run to run."""
    graph = json.loads(view.page.evaluate("() => JSON.stringify(app.graph.serialize())"))
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{comfyui.PACK}/{name}"))
    graph["extra"]["ds"] = {"scale": VIEW_SCALE, "offset": [NOTE_WIDTH + GAP + BARS[0] / VIEW_SCALE, BARS[1] / VIEW_SCALE]}
    return graph


def shoot(view, x, y, width, height, margin, results=False):
    """Return a picture of a part of the graph, as large as the window allows, at most at its own size. results: wait for the
    images that the nodes show.
    """
    place = call(view, "show", x - margin, y - margin, width + 2 * margin, height + 2 * margin, 1)
    if results:
        call(view, "loaded")
    return Image.open(io.BytesIO(view.page.screenshot(clip=place))).convert("RGB")


def save_jpeg(picture, path, most_bytes=MOST_BYTES):
    """Write a picture as the largest JPEG of at most `most_bytes` bytes. Raises ValueError if there is none."""
    for width in (1600, 1400, 1200, 1000, 800, 600):
        smaller = picture.copy()
        smaller.thumbnail((width, width), Image.Resampling.LANCZOS)
        for quality in (80, 70, 60, 50):
            file = io.BytesIO()
            smaller.save(file, "JPEG", quality=quality, optimize=True, progressive=True)
            if file.tell() <= most_bytes:
                path.write_bytes(file.getvalue())
                return
    raise ValueError(f"{path.name}: no JPEG of at most {most_bytes} bytes; show fewer groups.")


def run(view):
    """Run the open workflow in the page. Raises RuntimeError if it fails."""
    if problem := call(view, "run"):
        raise RuntimeError(f"the workflow failed: {problem}")


def warm_up(view):
    """Run the open workflow once with other noise, so that the seconds it will show include no first use."""
    workflow = view.api_workflow()
    for node in workflow.values():
        if isinstance(node["inputs"].get("seed"), int):
            node["inputs"]["seed"] += 1
        elif node["class_type"] == "PrimitiveInt":  # the seed that several samplers share
            node["inputs"]["value"] += 1
    view.server.run(workflow)


def draw_workflow(view, name):
    """Write the three files of an example workflow."""
    page = PAGES[name]
    load(view)
    view.open_api(api_workflow(name), name)
    decorate(view, name, page)
    write_json(WORKFLOWS / "api" / f"{name}.json", view.api_workflow())
    write_json(WORKFLOWS / f"{name}.json", serialized(view, name))
    if page.timed:
        warm_up(view)
    if page.runs:
        run(view)
    shown = call(view, "area", page.picture or [group.title for group in page.groups])
    save_jpeg(shoot(view, *shown, margin=16, results=page.runs), WORKFLOWS / f"{name}.jpg")
    if view.errors:
        raise RuntimeError(f"{name}: the frontend complains: {view.errors}")


def draw_nodes(view):
    """Write a picture of each of the pack's nodes."""
    load(view)
    NODE_PICTURES.mkdir(exist_ok=True)
    for name in sorted(name for name in view.server.get("/object_info") if name.startswith("IEC")):
        width, height = call(view, "only", name, LEAST_NODE_WIDTH)
        picture = shoot(view, 0, -TITLE, width, height + TITLE, margin=12)
        picture.quantize(128, dither=Image.Dither.NONE).save(NODE_PICTURES / f"{name}.png", optimize=True)


def draw_quick_start(view):
    """Write README.md's picture of quick_start after a run, from the file that ComfyUI lists as a template."""
    load(view)
    view.open(json.loads((WORKFLOWS / "quick_start.json").read_text()), "quick_start")
    run(view)
    picture = shoot(view, *call(view, "area", README_GROUPS), margin=12, results=True)
    save_jpeg(picture, README_PICTURES / "quick_start.jpg", MOST_BYTES_IN_README)
    if view.errors:
        raise RuntimeError(f"quick_start: the frontend complains: {view.errors}")


def grid_workflow():
    """Return the demonstration's workflow with four images, 20 steps, DeepCache at interval 3, and fewer runs."""
    workflow = demo.with_settings(api_workflow("compare_variants"), steps=20)
    workflow["positive"]["inputs"]["labels"] = "face, heart, person, vehicle"
    workflow["latent"]["inputs"]["batch_size"] = 4
    workflow["deepcache"]["inputs"]["interval"] = 3
    for rule in ("none", "auto"):
        workflow[f"sample_deepcache_{rule}"]["inputs"]["label"] = "DeepCache 3"
    reports = ["sample_reference", 1]
    for model in ("model", "w8a8", "w4a8", "deepcache"):
        runs = {"more": [f"sample_{model}_none", 1], "more_2": [f"sample_{model}_auto", 1]}
        workflow[f"join_{model}"]["inputs"] = {"reports": reports, **runs}
        reports = [f"join_{model}", 0]
    workflow["compare"]["inputs"]["reports"] = reports
    return workflow


def draw_grid(host):
    """Write README.md's picture of a comparison, and print its table."""
    outputs = host.run(grid_workflow())
    picture = Image.open(io.BytesIO(host.image(outputs["grid"]["images"][0]))).convert("RGB")
    picture.save(README_PICTURES / "grid.png", optimize=True)
    print(outputs["table"]["text"][0])


def folder_of_models(folder):
    """Put a file into each folder that the pack's loaders read, so that they show a file name; return their base folder."""
    for kind in ("diffusion_models", "iec_profiles"):
        path = pathlib.Path(folder) / kind / "example.safetensors"
        path.parent.mkdir()
        path.touch()
    return folder


@contextlib.contextmanager
def open_frontend(scale):
    """Yield a Frontend on its own server. scale: device pixels per pixel of its window."""
    with (
        tempfile.TemporaryDirectory(prefix="comfyui-iec-") as scratch,
        server.serve(models=folder_of_models(scratch)) as host,
        frontend.show(host, viewport=VIEWPORT, scale=scale) as view,
    ):
        yield view


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    others = ("nodes", "readme")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join((*others, *PAGES)))
    names = parser.parse_args().names or [*PAGES, *others]
    if unknown := set(names) - {*PAGES, *others}:
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join((*others, *PAGES))}")
    names = [*filter(None, (PAGES[name].after for name in names if name in PAGES)), *names]
    workflows = [name for name in PAGES if name in names]
    if workflows:
        with open_frontend(scale=1) as view:
            for name in workflows:
                print(name, flush=True)
                draw_workflow(view, name)
    if "nodes" in names or "readme" in names:
        with open_frontend(scale=2) as view:
            if "nodes" in names:
                print("nodes", flush=True)
                draw_nodes(view)
            if "readme" in names:
                print("readme", flush=True)
                README_PICTURES.mkdir(exist_ok=True)
                draw_quick_start(view)
                draw_grid(view.server)


if __name__ == "__main__":
    sys.exit(main())
