"""A real browser on a real ComfyUI: two frontends, each in both of its renderers.

$MIRA_FRONTEND is the static folder of the newest frontend, $MIRA_CHROMIUM a Chromium (both set by `dev.py test`).
Screenshots go to output/screenshots/.
"""

from __future__ import annotations

import json
import os
import time

import pytest
from playwright.sync_api import sync_playwright

from testing.servers import WITH_SMALL_MODEL
from tools.comfy import ROOT, Server

SHOTS = ROOT / "output" / "screenshots"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EMPTY = {"nodes": [], "links": [], "groups": [], "last_node_id": 0, "last_link_id": 0, "version": 0.4}
READY = "window.app && window.app.graph && window.app.extensionManager && window.app.vueAppReady !== false"


def pytest_collection_modifyitems(items):
    """One window after the other, so that each is opened once."""
    mine = [i for i, item in enumerate(items) if "frontend" in getattr(item, "fixturenames", ())]
    wanted = sorted(
        (items[i] for i in mine), key=lambda item: [item.callspec.params[p] for p in ("frontend", "window")]
    )
    for i, item in zip(mine, wanted, strict=True):
        items[i] = item


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["MIRA_CHROMIUM"], args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=["1.32.9", "1.58.1"])
def frontend(request):
    """(version, a server that serves it)."""
    newest = ("--front-end-root", os.environ["MIRA_FRONTEND"]) if request.param != "1.32.9" else ()
    # With the nodes for paid services: without, ComfyUI forbids the page more than a person meets.
    with Server(arguments=(*newest, *WITH_SMALL_MODEL), paid=True) as server:
        yield request.param, server


class Editor:
    """A page with the graph editor, ready to use."""

    def __init__(self, page, server, label):
        self.page, self.server, self.label = page, server, label
        self.errors: list[str] = []
        page.set_default_navigation_timeout(120_000)
        page.on("pageerror", lambda problem: self.errors.append(str(problem)))
        self.open()

    def open(self) -> None:
        self.page.goto(self.server.url)
        self._ready()

    def reload(self) -> None:
        self.page.reload()
        self._ready()

    def _ready(self) -> None:
        self.page.wait_for_function(READY, timeout=180_000)
        self.settle(400)

    def settle(self, milliseconds: int = 250) -> None:
        """What was asked for is drawn, however busy the machine is, and what that asks the server is on its way."""
        self.js("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        self.page.wait_for_timeout(milliseconds)

    def js(self, code: str, argument=None):
        return self.page.evaluate(code, argument)

    def load(self, workflow: dict) -> None:
        self.js("async w => { await app.loadGraphData(w); }", workflow)
        self.settle()

    def load_prompt(self, prompt: dict) -> None:
        self.js("async p => { await app.loadApiJson(p, 'test'); }", prompt)
        self.settle()

    def prompt(self) -> dict:
        return self.js("async () => (await app.graphToPrompt()).output")

    def queue(self) -> None:
        self.js("async () => { await app.queuePrompt(0); }")

    def set(self, kind: str, **values) -> None:
        self.js(
            """([kind, values]) => {
                const node = app.graph.nodes.find(n => n.comfyClass === kind);
                for (const [name, value] of Object.entries(values))
                    node.widgets.find(w => w.name === name).value = value;
            }""",
            [kind, values],
        )

    def look_at(self, kind: str, scale: float = 0.72, bottom: bool = False) -> None:
        """Scroll the canvas to the node of this kind, its top or its bottom. (Far out, Vue nodes take no clicks.)"""
        self.js(
            """([kind, scale, bottom]) => {
                const n = app.graph.nodes.find(n => n.comfyClass === kind), c = app.canvas;
                c.ds.scale = scale;
                const top = bottom ? n.pos[1] + n.size[1] - 900 / scale : n.pos[1] - 130 / scale;
                c.ds.offset = [-n.pos[0] + 260 / scale, -top];
                c.setDirty(true, true);
            }""",
            [kind, scale, bottom],
        )
        self.settle()

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}_{self.label}.png")

    def stop(self) -> None:
        """Nothing of a test goes on in the next one."""
        self.page.request.post(f"{self.server.url}/queue", data={"clear": True})
        self.page.request.post(f"{self.server.url}/interrupt")
        self.wait_idle()
        self.page.evaluate("localStorage.clear()")

    def wait_idle(self, timeout: float = 120) -> None:
        """Until the server has nothing queued or running."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            queue = json.loads(self.page.request.get(f"{self.server.url}/queue").text())
            if not queue["queue_running"] and not queue["queue_pending"]:
                return
            self.page.wait_for_timeout(200)
        raise TimeoutError("the server is still busy")


@pytest.fixture(scope="session")
def context(browser, frontend):
    """One for all pages of a frontend, whose thousands of files are then fetched once."""
    # Drawn without a GPU, movement takes more of the processor than all that is tested.
    context = browser.new_context(viewport={"width": 1500, "height": 1000}, reduced_motion="reduce")
    yield context
    context.close()


def opened(context, server, label: str) -> Editor:
    page = context.new_page()
    settings = {"Comfy.VueNodes.Enabled": label.endswith("vue"), "Comfy.TutorialCompleted": True}
    settings |= {"Comfy.Minimap.Visible": False, "LiteGraph.Canvas.MaximumFps": 12}
    page.request.post(f"{server.url}/settings", data=settings)
    return Editor(page, server, label)


@pytest.fixture(scope="session", params=["classic", "vue"])
def window(request, context, frontend):
    """A page of one renderer, as a person has it open for hours: to load it is most of a test's time."""
    version, server = frontend
    editor = opened(context, server, f"{version}_{request.param}")
    yield editor
    editor.page.close()


@pytest.fixture
def editor(window):
    window.errors.clear()
    window.load(EMPTY)
    yield window
    window.stop()


@pytest.fixture
def own_editor(window, context):
    """A page of its own, as a person has it who opens ComfyUI."""
    editor = opened(context, window.server, window.label)
    yield editor
    editor.stop()
    editor.page.close()
