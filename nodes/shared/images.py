"""ComfyUI's images, (B, H, W, C), as the core wants them, (B, 3, H, W), and back."""

from __future__ import annotations

from torch import Tensor


def to_core(images: Tensor, what: str) -> Tensor:
    """float32, or float64 as it is. Raises ValueError, beginning with `what`, for all but a batch of RGB images."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        found = f"of shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise ValueError(f"{what} is {found}: connect an IMAGE, (batch, height, width, 3)")
    if images.numel() == 0:
        raise ValueError(f"{what} has shape {tuple(images.shape)}: there is no image in it")
    channels = images.shape[3]
    if channels != 3:
        kind = {1: "greyscale", 2: "greyscale with transparency", 4: "RGB with transparency"}.get(channels, "no RGB")
        raise ValueError(
            f"{what} has {channels} channel(s) ({kind}): scorers read RGB; split off the alpha or repeat the grey first"
        )
    if not images.is_floating_point():
        raise ValueError(f"{what} is of {images.dtype}: ComfyUI's images are floats from 0 to 1; divide by 255 first")
    low, high = images.min().item(), images.max().item()
    if low < -1 or high > 2:  # a decoder goes somewhat beyond 0 and 1
        raise ValueError(
            f"{what} has values from {low:.4g} to {high:.4g}, where ComfyUI's images go from 0 to 1: look at the node "
            "that made it"
        )
    return images.movedim(3, 1).to(images.dtype if images.dtype.itemsize > 4 else images.float().dtype)
