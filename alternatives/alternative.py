"""What an alternative to an injection is: its name, its words, its settings, and what it does to an agent."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn as nn

from support.usage import UsageError


@dataclass(frozen=True)
class Words:
    """How an intervention is spoken of."""

    log: str
    """what a run logs that it has done: head drawn anew"""
    noun: str
    """in figures and tables: head reset"""
    plural: str
    """plural of that name: head resets"""
    deed: str
    """the subject of "... has raised the return": resetting the head"""


@dataclass(frozen=True)
class AgentParts:
    """The parts that an alternative changes, always in place: optimizer and captured graphs refer to them.

    Random numbers come from CPU generators seeded by the run's seed and the number of interventions so far
    (for a periodic one, by the step instead). No other random stream is affected.
    """

    encoder: nn.Module
    head: nn.Module
    """the one that learns"""
    optimizer: torch.optim.Optimizer
    draw_encoder: Callable[[], nn.Module]
    """a new encoder, as it is at the beginning of a run"""
    draw_head: Callable[[], nn.Module]
    """a new head of the same width, as it is at the beginning of a run"""
    generator: torch.Generator
    """for other random numbers; a new encoder's come from it, too"""
    activations: dict[str, torch.Tensor] = field(default_factory=dict)
    """{layer: what its ReLU puts out, (B, units) or (B, channels, H, W)}, in the order of the layers, on
    `batch_size` replayed observations: conv1 to conv3, and head. Empty where that is 0"""


@dataclass(frozen=True)
class NoSettings:
    """For an alternative that has no settings."""


@dataclass(frozen=True)
class Alternative:
    """One value of --intervention, beside `injection` and `none`.

    One that happens once does so at each --injection-step. The target network then becomes a copy of the
    online one, and bfloat16 copies and captured graphs are made anew. The optimizer state of newly drawn
    layers is emptied or kept, as --moments says.

    A periodic one happens from --injection-step on. The target network waits for its next sync, bfloat16
    copies are updated, and captured graphs stay. So it has to change the optimizer's tensors in place, too,
    as `empty_in_part` does.

    It keeps nothing from one call to the next: no checkpoint would hold that.

    Raises:
        UsageError: it is periodic and draws the head or the encoder anew; a setting's name begins with no_.
    """

    name: str
    words: Words
    apply: Callable[[AgentParts, Any], dict[str, int] | None]
    """changes the parts. It is called under no_grad, with `settings` as the second argument. A periodic one
    may return {name: count}, which is logged as the curve injection/name"""
    draws_head: bool
    """whether `apply` draws the learning head anew, so that --moments decides on its moments"""
    draws_encoder: bool = False
    """the same of the encoder"""
    settings: type = NoSettings
    """a frozen dataclass; its fields are flags of the training script, and `__post_init__` may check them.
    Where a field is `Annotated` with `OnlyWith`, its flag is refused with other interventions"""
    period: str | None = None
    """the setting that holds the steps between two applications; None if it happens once"""
    batch_size: int = 0
    """for a periodic one: how many replayed observations it gets; one that happens once gets none"""

    def __post_init__(self) -> None:
        if self.period is not None and self.draws_layers:
            fix = "give several steps to --injection-step instead of a period"
            raise UsageError(f"{self.name} draws layers anew, whose moments --moments decides on once: {fix}")
        for setting in fields(self.settings):
            if setting.name.startswith("no_"):
                raise UsageError(
                    f"{setting.name} would be a flag like --no-..., which takes one back: call it otherwise"
                )

    @property
    def draws_layers(self) -> bool:
        """Whether there are new layers, on whose moments --moments decides."""
        return self.draws_head or self.draws_encoder

    def settings_in(self, flags: Any) -> Any:
        """Its settings, out of an object that has them as attributes, and others besides.

        Raises:
            UsageError: they contradict each other.
        """
        return self.settings(**{field.name: getattr(flags, field.name) for field in fields(self.settings)})


def refuse_shared_fields(*kinds: type) -> None:
    """Raises UsageError where two dataclasses have a field of one name: only one would become a flag."""
    owners: dict[str, str] = {}
    for kind in kinds:
        for setting in fields(kind):
            if setting.name in owners:
                both = f"{owners[setting.name]} and {kind.__name__}"
                raise UsageError(f"{both} have a setting {setting.name} each: rename one")
            owners[setting.name] = kind.__name__


def by_name(alternatives: Iterable[Alternative]) -> dict[str, Alternative]:
    """Alternatives by the name that --intervention takes.

    Raises:
        UsageError: a name is taken, by another one, by the injection or by none.
    """
    named: dict[str, Alternative] = {}
    for alternative in alternatives:
        if alternative.name in ("injection", "none", *named):
            raise UsageError(f"the name {alternative.name} is taken: give the alternative another")
        named[alternative.name] = alternative
    return named
