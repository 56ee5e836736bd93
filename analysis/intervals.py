"""Means, interquartile means and geometric means over seeds, with 95% intervals."""

import numpy as np
import scipy.stats

MIN_SEEDS = 3  # per arm, for a verdict and for an interval
CONFIDENCE = 0.95
RESAMPLES = 2_000  # of a bootstrap


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean: that of what is left without the lowest and highest quarter, rounded down."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def no_spread(low: np.ndarray, high: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """Where an interval of numbers of this size is a point: equal ones do not tell how sure they are."""
    return high - low <= 1e-9 * size


def t_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high, (...), of the 95% t interval of the mean over the first axis of (n, ...), n ≥ 2."""
    half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * scipy.stats.sem(values, axis=0)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def geometric_interval(logs: np.ndarray, min_seeds: int = MIN_SEEDS) -> np.ndarray:
    """Geometric mean over seeds and its 95% interval, never below 0, (3, ...) of the logs (n, ...) of values.

    The interval is the t interval of the mean log; NaN below `min_seeds`.
    """
    centre = logs.mean(axis=0)
    low, high = t_interval(logs) if len(logs) >= min_seeds else np.full((2, *centre.shape), np.nan)
    return np.exp([centre, low, high])


def interval(values: np.ndarray, aggregate: str = "mean") -> np.ndarray:
    """Mean or interquartile mean over seeds and its 95% interval, (3, ...) of (n, ...).

    The interval is NaN below 3 seeds, and where these do not differ.
    """
    centre = values.mean(axis=0) if aggregate == "mean" else iqm(values, axis=0)
    if len(values) < MIN_SEEDS or not centre.size:
        low = high = np.full_like(centre, np.nan)
    elif aggregate == "mean":
        low, high = t_interval(values)
    else:
        how = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(0)}
        result = scipy.stats.bootstrap((values,), iqm, confidence_level=CONFIDENCE, **how)
        low, high = result.confidence_interval
    low, high = np.where(no_spread(low, high, np.abs(centre)), np.nan, (low, high))
    return np.array([centre, low, high])
