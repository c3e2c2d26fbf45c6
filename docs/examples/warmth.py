"""A reward of one's own: copy it into ComfyUI/models/mira_rewards and choose it in `MIRA Reward from Python File`.

FACTS: name and typical (where ordinary images score) are needed; low, high, differentiable (True) and needs_prompt
(False) have defaults. score: images (B, 3, H, W) in [0, 1], one prompt per image -> one number per image, higher is
better. Compute it with torch from `images` to keep the gradient; if you cannot, set differentiable to False.
"""

FACTS = {"name": "warmth", "low": -1.0, "high": 1.0, "typical": (-0.2, 0.2)}


def score(images, prompts):
    red, _, blue = images.unbind(1)
    return (red - blue).flatten(1).mean(1)
