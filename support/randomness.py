"""Seeds of independent random streams."""

import numpy as np


def stream_seed(seed: int, stream: int, key: int = 0) -> int:
    """A seed in [0, 2³⁰) for one use; neighbouring run seeds, streams and keys give unrelated ones."""
    return int(np.random.SeedSequence([seed, stream, key]).generate_state(1)[0]) >> 2
