"""Reset of moments: the optimizer's state is emptied. No weight changes.

Asadi et al. 2023 (Resetting the Optimizer in Deep RL, arXiv 2306.17833) do so with all of it, at each sync of
the target network. Here it happens where an injection would, and as then the target network is made a copy of
the online one. It is the control of arms whose new layers begin with empty moments.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from alternatives.alternative import AgentParts, Alternative, Words
from support.optimizers import empty_moments
from support.usage import OnlyWith


@dataclass(frozen=True)
class ResetMomentsSettings:
    """Whose moments go."""

    reset_moments_of: Annotated[
        Literal["head", "all"],
        OnlyWith("intervention", ("reset-moments", "none")),
    ] = "head"
    """whose moments reset-moments empties: the learning head's, or all (Asadi et al. 2023)"""


def reset_moments(parts: AgentParts, settings: ResetMomentsSettings) -> None:
    """Deletes the optimizer's state of the head, or of all parameters, including step counts."""
    if settings.reset_moments_of == "all":
        parts.optimizer.state.clear()
    else:
        empty_moments(parts.optimizer, parts.head)


ALTERNATIVE = Alternative(
    name="reset-moments",
    words=Words(
        log="optimizer's moments emptied",
        noun="moment reset",
        plural="moment resets",
        deed="emptying the optimizer's moments",
    ),
    apply=reset_moments,
    draws_head=False,
    settings=ResetMomentsSettings,
)
