"""`python dev.py serve`: the server for a person."""

from __future__ import annotations

import sys
import time

from tools.comfy import ROOT, Server, ServerError, stop_cleanly


def main() -> int:
    folder = ROOT / ".cache" / "serve"
    folder.mkdir(parents=True, exist_ok=True)
    stop_cleanly()
    try:
        with Server(folder, paid=True) as server:
            print(f"ComfyUI is at {server.url}  (Ctrl+C stops it)")
            print("Open example_workflows/01 Quickstart.json there, or Workflow > Browse Templates > mira.")
            while server.process.poll() is None:
                time.sleep(0.5)
            print(f"ComfyUI ended:\n{server.tail()}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        return 0
    except ServerError as problem:
        print(f"serve: {problem}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
