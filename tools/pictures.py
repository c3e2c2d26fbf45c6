"""Makes web/docs/pictures/<NodeId>.jpg: every node as the graph editor draws it.

python -m tools.pictures      (in ComfyUI's environment, $MIRA_COMFYUI and $MIRA_CHROMIUM set, as dev.py sets them)
"""

from __future__ import annotations

import io
import os

from PIL import Image
from playwright.sync_api import sync_playwright

from .comfy import Server
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
    return [node.size[0], node.size[1]];
}""" % (LEFT, TOP)  # noqa: UP031  (braces abound)


def main() -> None:
    (FOLDER / "pictures").mkdir(parents=True, exist_ok=True)
    with Server() as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["MIRA_CHROMIUM"], args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(server.url)
        page.wait_for_function(READY, timeout=60_000)
        # Else the first visit opens the template browser, over the nodes.
        page.evaluate("async () => { await app.extensionManager.setting.set('Comfy.TutorialCompleted', true); }")
        page.reload()
        page.wait_for_function(READY, timeout=60_000)
        page.wait_for_timeout(2000)
        assert not page.query_selector("[role=dialog]"), "a dialog covers the nodes"
        top = page.evaluate("() => app.canvas.canvas.getBoundingClientRect().top")
        for node in pages():
            width, height = page.evaluate(PLACE, node)
            clip = {"x": LEFT - 12, "y": top + TOP - 56, "width": width + 24, "height": min(height + 68, HEIGHT - TOP)}
            shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            shot.save(FOLDER / "pictures" / f"{node}.jpg", quality=80)
            print(node, flush=True)
        browser.close()


if __name__ == "__main__":
    main()
