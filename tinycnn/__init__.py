"""Everything that nobody edits to run an experiment; docs/structure.md names each file."""

import os

# Albumentations reads this at import; without it, every start would look for a newer release in the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
