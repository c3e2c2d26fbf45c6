"""Rewards: callables with facts, torch only, nothing of ComfyUI."""
