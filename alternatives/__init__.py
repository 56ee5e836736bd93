"""What an injection is compared with: a file each, and the list of them."""

import importlib
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING

from alternatives.alternative import Alternative

FILES = (
    "reset_moments",
    "reset_head",
    "shrink_perturb",
    "reset_all",
    "fire",
    "redo",
)

ALTERNATIVES: dict[str, Alternative] = {}  # by the name that --intervention takes
for file in FILES:
    alternative = importlib.import_module(f"alternatives.{file}").ALTERNATIVE
    ALTERNATIVES[alternative.name] = alternative

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class AlternativeSettings:
        """The settings of all alternatives together, which become flags of the training script."""

else:
    kinds = dict.fromkeys(alternative.settings for alternative in ALTERNATIVES.values())
    # the last base's fields come first
    bases = tuple(reversed(kinds))
    AlternativeSettings = make_dataclass("AlternativeSettings", (), bases=bases, frozen=True)
