"""The demo world: a small text-to-image model, its CLIP and its judge, all trained on emoji."""
