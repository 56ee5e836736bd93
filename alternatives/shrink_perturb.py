"""Shrink and perturb: the encoder is mixed with a new one, and the head is drawn anew.

Ash & Adams 2020 (arXiv 1910.08475) shrink all weights and add noise. D'Oro et al. 2023 (Sample-Efficient
Reinforcement Learning by Breaking the Replay Ratio Barrier) mix the encoder with a new one, as here.
"""

from dataclasses import dataclass
from typing import Annotated

from alternatives.alternative import AgentParts, Alternative, Words
from support.usage import OnlyWith, Share


@dataclass(frozen=True)
class ShrinkPerturbSettings:
    """How much of the encoder stays."""

    shrink_factor: Annotated[Share, OnlyWith("intervention", ("shrink-perturb", "none"))] = 0.8
    """share of the encoder that shrink-perturb keeps (D'Oro et al. 2023)"""


def shrink_perturb(parts: AgentParts, settings: ShrinkPerturbSettings) -> None:
    """encoder ← factor · encoder + (1 − factor) · new, and a new head. The encoder's moments stay."""
    kept_share = settings.shrink_factor
    new_encoder = parts.draw_encoder()
    for old, new in zip(parts.encoder.parameters(), new_encoder.parameters(), strict=True):
        old.copy_(kept_share * old + (1 - kept_share) * new.to(old.device))
    parts.head.load_state_dict(parts.draw_head().state_dict())


ALTERNATIVE = Alternative(
    name="shrink-perturb",
    words=Words(
        log="encoder shrunk and perturbed, head drawn anew",
        noun="shrink and perturb",
        plural="shrink and perturb",
        deed="shrink and perturb",
    ),
    apply=shrink_perturb,
    draws_head=True,
    settings=ShrinkPerturbSettings,
)
