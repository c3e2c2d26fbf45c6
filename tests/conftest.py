"""The pack as the package `mira`, and ComfyUI in $MIRA_COMFYUI (set by `dev.py test`)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from testing.pack import mira
from tools.comfy import stop_cleanly

mira("sampler")
stop_cleanly()  # a terminated test run stops its server
if not os.environ.get("MIRA_COMFYUI"):
    collect_ignore = ["comfy", "server", "browser"]
elif not os.environ.get("MIRA_CHROMIUM"):
    collect_ignore = ["browser"]  # dev.py test --no-browser


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    # Playwright keeps an event loop running in this thread until the end, which `asyncio.run` does not bear: the
    # mathematics, which has none, comes after, in pieces that leave neither worker waiting for the other's last one.
    last = {"browser": 1, "core": 2}
    items.sort(key=lambda item: last.get(item.path.relative_to(Path(__file__).parent).parts[0], 0))
    for item in items:
        # With several workers: what shares a server stays together.
        frontend = item.callspec.params.get("frontend", "") if hasattr(item, "callspec") else ""
        shared = item.path.parent.name == "server" and "server" in item.fixturenames
        item.add_marker(pytest.mark.xdist_group("server" if shared else f"{item.path.name}{frontend}"))


@pytest.hookimpl(optionalhook=True)  # without xdist nobody calls it
def pytest_xdist_node_collection_finished(node, ids):
    """With a pytest whose ids xdist cannot mark, every worker would start every server, and nobody would notice."""
    if node.config.option.dist == "loadgroup" and ids and "@" not in ids[0]:
        pytest.exit("tests that share a server are not kept together: take the pytest of requirements-dev.txt", 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def what_is_imported_stays():
    """The collector need not look at it each time: it runs wherever memory ran out, and where leaks are looked for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def as_exact_on_a_gpu():
    """Tests compare bits, or to 1e-4: as on a CPU, a GPU is to take the same way every time, and float32 whole."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as in a run
