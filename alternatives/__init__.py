"""What an injection is compared with: a file each, and the list of them."""

from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING

from alternatives.reset_head import RESET_HEAD
from alternatives.shrink_perturb import SHRINK_PERTURB

LIST = (
    RESET_HEAD,
    SHRINK_PERTURB,
)

ALTERNATIVES = {alternative.name: alternative for alternative in LIST}

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class AlternativeSettings:
        """The settings of all alternatives together, which become flags of the training script."""

else:
    settings = dict.fromkeys(alternative.settings for alternative in LIST)
    AlternativeSettings = make_dataclass("AlternativeSettings", (), bases=tuple(settings), frozen=True)
