"""Trains the demo models from emoji art: see `demo/MODEL_CARD.md` for the order of the commands."""
