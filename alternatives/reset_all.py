"""Full reset: the whole network is drawn anew. Replay, exploration and the step stay.

D'Oro et al. 2023 (Sample-Efficient Reinforcement Learning by Breaking the Replay Ratio Barrier) do so every
so often, and empty the whole optimizer. Here it happens where an injection would, and --moments says whether
the optimizer's state is emptied.
"""

from alternatives.alternative import AgentParts, Alternative, NoSettings, Words


def reset_all(parts: AgentParts, settings: NoSettings) -> None:
    """Gives the encoder and the head that learns the weights of new ones."""
    parts.encoder.load_state_dict(parts.draw_encoder().state_dict())
    parts.head.load_state_dict(parts.draw_head().state_dict())


ALTERNATIVE = Alternative(
    name="reset-all",
    words=Words(
        log="whole network drawn anew",
        noun="full reset",
        plural="full resets",
        deed="resetting the whole network",
    ),
    apply=reset_all,
    draws_head=True,
    draws_encoder=True,
)
