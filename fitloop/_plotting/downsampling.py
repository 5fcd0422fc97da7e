"""What is drawn of a series too long to be drawn whole: its outline, and its running mean.

Owns arithmetic on arrays only; knows no figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_POINTS = 4000
"""points a line has at most; a longer one is thinned"""

_STRETCHES = 5
"""stretches that a running mean is taken over"""
_WINDOWS = 100
"""the windows of a running mean that fit into a series, roughly"""


def thin(values: NDArray[np.float64], max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return the indices, in order, of at most ``max_points`` (4 or more) values worth drawing.

    These are all when there are no more than that. Otherwise they are the first, the last, and the
    least and greatest finite value of each of many equal stretches, so that no spike is lost;
    a stretch with nothing finite stays a gap.
    """
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    size = -(-count // (max_points // 2 - 1))
    stretches = _stretches(values, size)
    finite = np.isfinite(stretches)
    starts = np.arange(len(stretches)) * size
    least = starts + np.where(finite, stretches, np.inf).argmin(axis=1)
    greatest = starts + np.where(finite, stretches, -np.inf).argmax(axis=1)
    return np.unique(np.concatenate([[0, count - 1], least, greatest]))


def window_of(count: int) -> int:
    """Return a round number of values to take the mean of in a series of ``count``."""
    size = max(1, count // (_WINDOWS * _STRETCHES))
    power = int(10 ** (len(str(size)) - 1))
    return _STRETCHES * max(step * power for step in (1, 2, 5) if step * power <= size)


def running_mean(
    values: NDArray[np.float64], window: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return places (indices, maybe between two) and the mean of ``window`` values around each.

    Only finite values count, and at both ends those there are. NaN stays where nothing is finite.
    """
    # Sums of stretches and not differences of one long sum, in which a spike of 1e20 would
    # swallow everything after it.
    size = max(1, window // _STRETCHES)
    stretches = _stretches(values, size)
    finite = np.isfinite(stretches)
    counts = finite.sum(axis=1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sums = np.where(finite, stretches, 0.0).sum(axis=1)
        means = _around(sums) / _around(counts)
    means[counts == 0] = np.nan
    starts = np.arange(len(stretches)) * size
    ends = np.minimum(starts + size, len(values)) - 1
    return (starts + ends) / 2, means


def _stretches(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Cut into rows of ``size``; the last one is filled up with NaN."""
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = values
    return padded.reshape(-1, size)


def _around(sums: NDArray[np.generic]) -> NDArray[np.float64]:
    padded = np.pad(sums.astype(np.float64), _STRETCHES // 2)
    total: NDArray[np.float64] = np.lib.stride_tricks.sliding_window_view(padded, _STRETCHES).sum(
        axis=1
    )
    return total
