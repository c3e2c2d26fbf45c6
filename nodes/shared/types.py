"""The pack's own connection types."""

from comfy_api.latest import io

MiraReward = io.Custom("MIRA_REWARD")
MiraTrace = io.Custom("MIRA_TRACE")


SCORES = "Scores images: for an optimising node, MIRA Score Images, or a node that combines rewards."


def reward_output(id: str = "reward") -> io.Output:
    return MiraReward.Output(id, display_name="reward", tooltip=SCORES)


def reward_input() -> io.Input:
    return MiraReward.Input("reward", tooltip="What there is to be more of: from any MIRA reward node.")


def where_known(**facts: object) -> dict:
    """Those facts of a schema that this core knows of."""
    return {name: fact for name, fact in facts.items() if name in io.Schema.__dataclass_fields__}


def aliases(*words: str) -> dict:
    """What else a node is found by."""
    return where_known(search_aliases=list(words))


def shown_again() -> dict:
    """What a node shows is sent again, and is in the history, when it came from the core's cache (0.19 on)."""
    return where_known(has_intermediate_output=True)
