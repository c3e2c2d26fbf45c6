"""Development tools: a ComfyUI server, a client of it, and the demo."""
