"""Random numbers of the batches: functions of (seed, epoch, image), never of the order in which batches are made."""

import numpy as np

ORDER, AUGMENTATION, WHOLE_BATCHES = 0, 1, 2  # the purposes of random streams


def random_stream(seed: int, purpose: int, epoch: int, image: int = 0) -> np.random.Generator:
    """The random numbers of one image in one epoch, or of a whole epoch: a function of the arguments alone.

    Philox hashes a counter under a key (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): streams that
    differ in any argument never overlap, and making one takes microseconds.
    """
    return np.random.Generator(np.random.Philox(
        key=np.array([seed, purpose], dtype=np.uint64), counter=np.array([0, 0, image, epoch], dtype=np.uint64)))
