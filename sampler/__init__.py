"""Inference-time alignment by noise optimisation: torch only, nothing of ComfyUI, nothing of any reward."""
