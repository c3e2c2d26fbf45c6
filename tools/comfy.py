"""A real ComfyUI server with the pack in it, and a client that speaks its HTTP and WebSocket API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 180


class ServerError(RuntimeError):
    """The server did not do what it should; the message says what, and what it printed."""


def comfyui_folder() -> Path:
    """The ComfyUI that `dev.py` chose."""
    folder = os.environ.get("MIRA_COMFYUI")
    if not folder:
        raise ServerError("MIRA_COMFYUI is not set: start this by `python dev.py ...`")
    return Path(folder)


@contextlib.contextmanager
def pack_for(comfyui: Path) -> Iterator[list]:
    """The arguments that make this ComfyUI load the pack. Nothing is written to its own folder."""
    nodes = comfyui / "custom_nodes"
    if any(entry.resolve() == ROOT for entry in nodes.iterdir()):
        yield []
        return
    if os.path.lexists(nodes / "mira"):
        raise ServerError(f"{nodes / 'mira'} is another copy of the pack: move it away, or run that copy's dev.py")
    # A folder of its own: whoever deletes the server's folder must not follow the link (a junction on Windows).
    folder = Path(tempfile.mkdtemp(prefix="mira-nodes-"))
    link, config = folder / "mira", folder / "paths.yaml"
    config.write_text(f"mira:\n  custom_nodes: {json.dumps(str(folder))}\n")
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(ROOT), str(link))  # needs no privilege, as a symbolic link would
    else:
        link.symlink_to(ROOT, target_is_directory=True)
    try:
        yield ["--extra-model-paths-config", config]
    finally:
        link.rmdir() if os.name == "nt" else link.unlink()
        config.unlink()
        folder.rmdir()


def stop_cleanly() -> None:
    """Being terminated counts as Ctrl+C: the server is stopped on the way out."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`with Server() as server`: started, answering, and stopped at the end, whatever happens.

    folder: where its input, output, user and temporary files go; a new one, deleted at the end, when not given.
    paid: with ComfyUI's nodes for paid services, which are a fifth of its start.
    """

    def __init__(self, folder: Path | None = None, arguments: tuple[str, ...] = (), paid: bool = False):
        self.comfyui = comfyui_folder()
        self.temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="mira-")) if folder is None else folder
        self.arguments = arguments if paid else (*arguments, "--disable-api-nodes")
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "server.log"

    def __enter__(self) -> Server:
        self.stack = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()

    def _start(self) -> None:
        if self.temporary:
            self.stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        for name in ("input", "output", "user", "temp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        pack = self.stack.enter_context(pack_for(self.comfyui))
        command = [sys.executable, self.comfyui / "main.py", "--listen", "127.0.0.1", "--port", self.port]
        command += ["--disable-auto-launch", "--input-directory", self.folder / "input"]
        command += ["--output-directory", self.folder / "output", "--user-directory", self.folder / "user"]
        command += ["--temp-directory", self.folder / "temp"]
        # A GPU gives a stock node's bits again only so.
        command += [*pack, *self.arguments, "--deterministic" if os.environ.get("MIRA_GPU") else "--cpu"]
        output = self.stack.enter_context(self.log.open("w"))
        # Its working directory keeps `nodes` and the like of this repository off its path.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [str(c) for c in command], cwd=self.comfyui, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        self.stack.callback(self._stop)
        deadline = time.monotonic() + START_SECONDS
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy knows this machine's port
        while True:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with code {self.process.returncode} at its start:\n{self.tail()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                opener.open(f"{self.url}/system_stats", timeout=5).read()
                return
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.tail()}")
            time.sleep(0.3)

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Client:
    """`async with Client(url) as client`: one client of the server, with a WebSocket of its own."""

    def __init__(self, url: str):
        self.url = url
        self.id = uuid.uuid4().hex

    async def __aenter__(self) -> Client:
        self.session = aiohttp.ClientSession()
        address = f"{self.url}/ws?clientId={self.id}"
        self.socket = await self.session.ws_connect(address, max_msg_size=0)
        return self

    async def __aexit__(self, *_) -> None:
        await self.socket.close()
        await self.session.close()

    async def get(self, path: str) -> dict:
        async with self.session.get(self.url + path) as answer:
            return await answer.json()

    async def submit(self, prompt: dict, workflow: dict | None = None) -> str:
        """Queue a prompt; returns its id. Raises ServerError with the server's own reasons when it is refused.

        workflow: what the editor sends along, for the files that are saved.
        """
        request: dict = {"prompt": prompt, "client_id": self.id}
        if workflow is not None:
            request["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        async with self.session.post(f"{self.url}/prompt", json=request) as answer:
            body = await answer.json()
        if answer.status != 200:
            reasons = [e for node in (body.get("node_errors") or {}).values() for e in node["errors"]]
            texts = [f"{e['message']}: {e.get('details', '')}" for e in reasons] or [json.dumps(body.get("error"))]
            raise ServerError("; ".join(texts))
        return body["prompt_id"]

    async def events(self, prompt_id: str) -> AsyncIterator[tuple[str, dict | bytes]]:
        """(type, data) until the prompt ends; previews come as ("preview", bytes). Raises ServerError on an error."""
        while True:
            message = await self.socket.receive(timeout=600)
            if message.type == aiohttp.WSMsgType.BINARY:
                yield "preview", message.data
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ServerError("the server closed the connection")
            event = json.loads(message.data)
            kind, data = event["type"], event["data"]
            yield kind, data
            if data.get("prompt_id") not in (None, prompt_id):
                continue
            if kind == "execution_error":
                raise ServerError(f"{data['node_type']}: {data['exception_message']}")
            if kind in ("execution_success", "execution_interrupted"):
                return

    async def interrupt(self) -> None:
        async with self.session.post(f"{self.url}/interrupt"):
            pass

    async def run(self, prompt: dict) -> dict:
        """Submit, wait, and return the history's outputs by node id."""
        prompt_id = await self.submit(prompt)
        async for _ in self.events(prompt_id):
            pass
        return await self.outputs(prompt_id)

    async def outputs(self, prompt_id: str) -> dict:
        """What the history keeps of a prompt that has ended; the server writes it just after the last event."""
        for _ in range(600):
            history = await self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]["outputs"]
            await asyncio.sleep(0.05)
        raise ServerError(f"the server has no history of prompt {prompt_id}")

    async def image(self, entry: dict) -> bytes:
        async with self.session.get(f"{self.url}/view", params=entry) as answer:
            return await answer.read()
