import os

# Albumentations reads this at import; without it, every start would look for a newer release in the network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
