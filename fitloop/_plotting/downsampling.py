"""Reduces a long series for a plot: to its extreme values, and to a running mean.

Arithmetic on arrays; knows no figures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_POINTS = 4000
"""largest number of points of a line; a longer one is downsampled"""

_BLOCKS_PER_WINDOW = 5
_WINDOWS = 100
"""approximate number of windows of a running mean in a series"""


def downsample(values: NDArray[np.float64], max_points: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return the sorted indices of at most ``max_points`` (4 or more) values to draw.

    A series that is short enough has all its indices. In a longer one these are the first and the
    last value, and the smallest and largest finite value of each of many equal blocks, so that all
    spikes stay visible. A block without finite values remains a gap.
    """
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    size = -(-count // (max_points // 2 - 1))
    blocks = _blocks(values, size)
    finite = np.isfinite(blocks)
    starts = np.arange(len(blocks)) * size
    smallest = starts + np.where(finite, blocks, np.inf).argmin(axis=1)
    largest = starts + np.where(finite, blocks, -np.inf).argmax(axis=1)
    return np.unique(np.concatenate([[0, count - 1], smallest, largest]))


def window_size(count: int) -> int:
    """Return a round number of values for the window of a running mean of ``count`` values."""
    size = max(1, count // (_WINDOWS * _BLOCKS_PER_WINDOW))
    power = int(10 ** (len(str(size)) - 1))
    return _BLOCKS_PER_WINDOW * max(step * power for step in (1, 2, 5) if step * power <= size)


def running_mean(
    values: NDArray[np.float64], window: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions, and the mean of ``window`` values around each of them.

    A position is an index, or halfway between two. The mean is over the finite values; at both ends
    the window is shorter. The mean of a block without finite values is NaN.
    """
    # Sums of blocks, not differences of cumulative sums, in which a spike of 1e20 would absorb all
    # later values.
    size = max(1, window // _BLOCKS_PER_WINDOW)
    blocks = _blocks(values, size)
    finite = np.isfinite(blocks)
    counts = finite.sum(axis=1)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sums = np.where(finite, blocks, 0.0).sum(axis=1)
        means = _window_sums(sums) / _window_sums(counts)
    means[counts == 0] = np.nan
    starts = np.arange(len(blocks)) * size
    ends = np.minimum(starts + size, len(values)) - 1
    return (starts + ends) / 2, means


def _blocks(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Return ``values`` in rows of ``size``; the last row is padded with NaN."""
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = values
    return padded.reshape(-1, size)


def _window_sums(sums: NDArray[np.generic]) -> NDArray[np.float64]:
    padded = np.pad(sums.astype(np.float64), _BLOCKS_PER_WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _BLOCKS_PER_WINDOW)
    total: NDArray[np.float64] = windows.sum(axis=1)
    return total
