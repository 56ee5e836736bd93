"""What any Atari agent needs: it knows neither the agent's arguments nor an injection."""

import sys

from support.usage import UsageError
from support.versions import refuse_wrong_versions

try:
    refuse_wrong_versions()  # first of all, since other modules here may not even be imported with such versions
except UsageError as error:
    sys.exit(f"error: {error}")
