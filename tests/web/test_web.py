"""The editor's pure modules, by Node's own test runner."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def node() -> str:
    """Node.js of the machine, or the one that Playwright brings."""
    if found := shutil.which("node"):
        return found
    playwright = pytest.importorskip("playwright", reason="there is no Node.js here, and no Playwright that brings one")
    return str(Path(playwright.__file__).parent / "driver" / "node")


def test_pure_modules():
    files = sorted(HERE.glob("*.test.mjs"))
    command = [node(), "--test", "--test-reporter=tap", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = sum(file.read_text().count("\ntest(") for file in files)
    assert written and f"\n# pass {written}\n" in done.stdout, done.stdout
