"""The pack's own connection types."""

from comfy_api.latest import io

MiraReward = io.Custom("MIRA_REWARD")
MiraTrace = io.Custom("MIRA_TRACE")


def reward_output():
    return MiraReward.Output("reward", display_name="reward")
