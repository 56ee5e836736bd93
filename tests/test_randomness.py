"""Seeds of random streams that are unrelated."""

from dqn_injection_atari import Stream
from support.randomness import stream_seed


def test_random_streams_of_a_run_and_of_neighbouring_seeds_are_unrelated():
    used = []
    for seed in range(200):
        first = stream_seed(seed, Stream.ENVIRONMENTS)
        used += range(first, first + 16)
    assert len(set(used)) == len(used), "no environment seed is shared"
    seeds = set()
    for seed in range(20):
        for stream in Stream:
            seeds |= {stream_seed(seed, stream, key) for key in range(20)}
    assert len(seeds) == 20 * len(Stream) * 20
    assert all(0 <= seed < 2**30 for seed in seeds)


def test_streams_keep_their_numbers_and_with_them_their_seeds():
    assert [stream.name for stream in sorted(Stream)] == [
        "NETWORK",
        "EXPLORATION",
        "REPLAY",
        "ENVIRONMENTS",
        "INJECTION",
        "EVALUATION",
        "PLASTICITY",
        "PERTURBATION",
    ]
    assert sorted(Stream) == list(range(len(Stream)))
    assert [stream_seed(1, Stream.NETWORK), stream_seed(1, Stream.INJECTION, 2)] == [458876031, 424278942]
