"""A reward server for `MIRA Reward from HTTP`: standard library and Pillow only.

    python reward_server.py [port]

It is asked with {"images": [PNG in base64, ...], "prompts": [text, ...]} and answers {"scores": [number, ...]}.
Replace `judge` by whatever looks at an image: a vision-language model served locally, a database of ratings, you.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def judge(image: Image.Image, prompt: str) -> float:
    """Higher is better: here, the share of the image's light that is green."""
    red, green, blue = (sum(i * n for i, n in enumerate(channel.histogram())) for channel in image.split())
    return green / max(red + green + blue, 1)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [Image.open(io.BytesIO(base64.b64decode(i))).convert("RGB") for i in asked["images"]]
            status, answer = 200, {"scores": [judge(*p) for p in zip(images, asked["prompts"], strict=True)]}
        except (KeyError, TypeError, ValueError, OSError) as problem:
            status, answer = 400, {"error": str(problem)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Handler)
    print(f"http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
