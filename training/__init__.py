import os

# Albumentations reads it at import: without it, each start would ask the network for news of a newer release.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
