"""What an injection is compared with: a file each, and the list of them."""

import importlib
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING

from alternatives.alternative import by_name

FILES = (
    "reset_moments",
    "reset_head",
    "shrink_perturb",
    "reset_all",
    "fire",
    "redo",
)

ALTERNATIVES = by_name(importlib.import_module(f"alternatives.{file}").ALTERNATIVE for file in FILES)

# each class once: alternatives without settings share NoSettings
SETTINGS = tuple(dict.fromkeys(alternative.settings for alternative in ALTERNATIVES.values()))

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class AlternativeSettings:
        """The settings of all alternatives together, which become flags of the training script."""

else:
    # the last base's fields come first
    bases = tuple(reversed(SETTINGS))
    AlternativeSettings = make_dataclass("AlternativeSettings", (), bases=bases, frozen=True)
