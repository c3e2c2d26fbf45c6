"""Makes web/docs/pictures/<NodeId>.jpg: every node as the graph editor draws it; docs/quickstart.jpg: the first
example's graph, when it has run; and docs/icon.png and docs/banner.png, for the registry.

python -m tools.pictures [NodeId, quickstart or registry ...]      (in ComfyUI's environment, $MIRA_COMFYUI and
$MIRA_CHROMIUM set, as dev.py sets them)
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time

from PIL import Image
from playwright.sync_api import sync_playwright

from .comfy import ROOT, Server
from .help import FOLDER, pages

WIDTH, HEIGHT, LEFT, TOP = 1300, 1500, 420, 120
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
READY = "window.app && window.app.graph && window.app.extensionManager && window.LiteGraph"
PLACE = """async id => {
    app.graph.clear();
    const node = LiteGraph.createNode(id);
    app.graph.add(node);
    await new Promise(done => setTimeout(done, 300));
    const wanted = node.computeSize();
    node.setSize([Math.max(wanted[0], 340), wanted[1]]);
    node.pos = [0, 0];
    Object.assign(app.canvas.ds, { scale: 1, offset: [%d, %d] });
    app.canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 400));
    const chart = node.widgets?.find(w => w.name === "mira_chart");
    return [node.size[0], chart?.y ?? chart?.last_y ?? node.size[1]];
}""" % (LEFT, TOP)  # noqa: UP031  (braces abound)


QUIET = """async () => {
    await app.extensionManager.setting.set("Comfy.TutorialCompleted", true);
    await app.extensionManager.setting.set("Comfy.Minimap.Visible", false);
}"""
REGISTRY = "registry"  # which takes an icon of at most 400 pixels a side, and a banner of 21:9
ICON, BANNER = 400, (1260, 540)
# Where docs/demo.png, of `dev.py demo`, shows a picture: as sampled, by this pack, and by the reward alone.
SHOWN_IN_DEMO = {
    "as sampled": (65, 437, 394, 765), "brighter, with MIRA": (469, 437, 798, 765),
    "brighter, by the reward alone": (873, 437, 1202, 765),
}  # fmt: skip
BANNER_PAGE = """<body style="margin: 0; width: 1260px; height: 540px; background: #1b1e24; color: #e8eaed;
    font-family: sans-serif; text-align: center">
<h1 style="margin: 0; padding-top: 44px; font-size: 54px">MIRA Alignment</h1>
<p style="margin: 10px 0 26px; font-size: 27px; color: #aeb4bd">
    Pictures that score higher, and still show the prompt</p>
<div style="display: flex; justify-content: center; gap: 48px">%s</div></body>"""
SHOT_OF_BANNER = """<figure style="margin: 0"><img width="270" height="270" style="border-radius: 14px"
    src="data:image/png;base64,%s"><figcaption style="margin-top: 12px; font-size: 21px">%s</figcaption></figure>"""
QUICKSTART, EXAMPLE = "quickstart", "01 Quickstart"  # the picture, and whose it is
# Pixels: of the window, of what lies over its edges, and of the picture.
WIDE, HIGH, EDGE, UNDER_THE_BAR, SHOWN = 2100, 1300, 80, 200, 1400
SHOW = (
    "([scale, x, y]) => { Object.assign(app.canvas.ds, { scale, offset: [x, y] }); app.canvas.setDirty(true, true); }"
)
RUN = """async workflow => {
    await app.loadGraphData(workflow);
    await app.queuePrompt(0);
}"""


def graph(page, server: Server) -> Image.Image:
    """The first example's whole graph with its chart and both pictures."""
    workflow = json.loads((ROOT / "example_workflows" / f"{EXAMPLE}.json").read_text())
    page.evaluate(RUN, workflow)
    end = time.monotonic() + 600
    while time.monotonic() < end:
        page.wait_for_timeout(500)
        queue = json.loads(page.request.get(f"{server.url}/queue").text())
        if not queue["queue_running"] and not queue["queue_pending"]:
            break
    page.set_viewport_size({"width": WIDE, "height": HIGH})
    boxes = page.evaluate("() => app.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, ...n.size])")
    left, top = (min(b[i] for b in boxes) for i in (0, 1))
    width, height = (max(b[i] + b[i + 2] + 30 * i for b in boxes) - least for i, least in ((0, left), (1, top)))
    scale = min((WIDE - 2 * EDGE) / width, (HIGH - UNDER_THE_BAR - EDGE) / height)
    page.evaluate(SHOW, [scale, EDGE / scale - left, UNDER_THE_BAR / scale - top])
    page.wait_for_timeout(1500)
    bar = page.evaluate("() => app.canvas.canvas.getBoundingClientRect().top")
    clip = {"x": EDGE - 10, "y": bar + UNDER_THE_BAR - 10, "width": width * scale + 20, "height": height * scale + 20}
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    return shot.resize((SHOWN, round(shot.height * SHOWN / shot.width)), Image.Resampling.LANCZOS)


def for_the_registry(page) -> None:
    """docs/icon.png and docs/banner.png, of docs/demo.png's pictures."""
    demo = Image.open(ROOT / "docs" / "demo.png").convert("RGB")
    shots = {said: demo.crop(box) for said, box in SHOWN_IN_DEMO.items()}
    icon = shots["brighter, with MIRA"].resize((ICON, ICON), Image.Resampling.LANCZOS)
    icon.save(ROOT / "docs" / "icon.png", optimize=True)
    page.set_viewport_size({"width": BANNER[0], "height": BANNER[1]})
    page.set_content(BANNER_PAGE % "".join(SHOT_OF_BANNER % (encoded(shot), said) for said, shot in shots.items()))
    page.screenshot(path=ROOT / "docs" / "banner.png")


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main(wanted: list[str]) -> None:
    (FOLDER / "pictures").mkdir(parents=True, exist_ok=True)
    with Server(paid=True) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["MIRA_CHROMIUM"], args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        # Else the first visit opens the template browser, over the nodes.
        page.evaluate(QUIET)
        page.reload()
        page.wait_for_function(READY, timeout=60_000)
        page.wait_for_timeout(2000)
        assert not page.query_selector("[role=dialog]"), "a dialog covers the nodes"
        top = page.evaluate("() => app.canvas.canvas.getBoundingClientRect().top")
        for node in [n for n in pages() if not wanted or n in wanted]:
            width, height = page.evaluate(PLACE, node)
            clip = {"x": LEFT - 12, "y": top + TOP - 36, "width": width + 24, "height": min(height + 44, HEIGHT - TOP)}
            shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            shot.save(FOLDER / "pictures" / f"{node}.jpg", quality=80)
            print(node, flush=True)
        if not wanted or QUICKSTART in wanted:
            graph(page, server).save(ROOT / "docs" / "quickstart.jpg", quality=85)
        if not wanted or REGISTRY in wanted:
            for_the_registry(page)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
