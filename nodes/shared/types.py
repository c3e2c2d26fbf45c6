"""The pack's own connection types."""

from comfy_api.latest import io

MiraReward = io.Custom("MIRA_REWARD")
MiraTrace = io.Custom("MIRA_TRACE")


def reward_output():
    return MiraReward.Output("reward", display_name="reward")


def aliases(*words: str) -> dict:
    """What else a node is found by, where the core knows of such words."""
    return {"search_aliases": list(words)} if "search_aliases" in io.Schema.__dataclass_fields__ else {}
