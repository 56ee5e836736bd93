"""Head reset: the head that learns is drawn anew.

Nikishin et al. 2022 (The Primacy Bias in Deep Reinforcement Learning, arXiv 2205.07802) do so every so often.
Here it happens where an injection would, and as then the target network is made a copy of the online one.
"""

from alternatives.alternative import AgentParts, Alternative, NoSettings, Words


def reset_head(parts: AgentParts, settings: NoSettings) -> None:
    """Gives the head that learns the weights of a new one."""
    parts.head.load_state_dict(parts.draw_head().state_dict())


ALTERNATIVE = Alternative(
    name="reset-head",
    words=Words(
        log="head drawn anew",
        noun="head reset",
        plural="head resets",
        deed="resetting the head",
    ),
    apply=reset_head,
    draws_head=True,
)
