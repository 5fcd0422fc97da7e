"""Keywords of ``Axes.plot`` for each line of a plot, derived from the keywords of the caller.

Owns colors, dashes and labels. Knows neither figures nor recorded values.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fitloop._plotting.selection import isolated_points
from fitloop._types import Phase

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_COLORS = ("color", "c")
_LINESTYLES = ("linestyle", "ls")
_WIDTHS = ("linewidth", "lw")
_MARKERS = ("marker", "markevery", "markersize", "ms")
_SHAPES = "os^Dv*P<X>hp"
MAX_COLORS = 10
"""number of colors of the cycle of matplotlib"""
MAX_PLAIN = 2
"""number of lines whose colors everybody tells apart; more have markers too"""
_NO_LINE = ("", " ", "none", "None")
_PALE = 0.3
"""opacity of the values below a running mean"""


def phase_options(kwargs: Mapping[str, Any], phase: Phase, num_lines: int) -> dict[str, Any]:
    """Return the keywords for the line of ``phase``, one of ``num_lines`` lines."""
    options = dict(kwargs)
    for key in ("label", *_COLORS, *_LINESTYLES):
        value = options.get(key)
        if isinstance(value, list) and len(value) == 2:
            options[key] = value[phase is Phase.VALID]

    label = kwargs.get("label")
    if label is None:
        options["label"] = str(phase)
    elif not isinstance(label, list) and num_lines > 1:
        options["label"] = f"{label} {phase}"

    colors = [kwargs[key] for key in _COLORS if kwargs.get(key) is not None]
    same_color = any(not (isinstance(color, list) and len(color) == 2) for color in colors)
    has_style = any(key in kwargs for key in _LINESTYLES)
    if same_color and not has_style and num_lines > 1 and phase is Phase.VALID:
        options["linestyle"] = "--"
    return options


def pale_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for the values below a running mean."""
    opacity = options.get("alpha")
    pale = {**options, "alpha": _PALE * (1.0 if opacity is None else opacity)}
    if not any(key in options for key in _WIDTHS):
        pale["linewidth"] = 0.8
    return pale


def mean_options(options: Mapping[str, Any], color: Any, text: str) -> dict[str, Any]:
    """Return the keywords for a running mean: a line of ``color``, even if the values have none."""
    mean = {key: value for key, value in options.items() if key not in (*_MARKERS, *_COLORS)}
    for key in _LINESTYLES:
        if mean.get(key) in _NO_LINE:
            del mean[key]
    mean.setdefault("zorder", 2.5)  # above the values of all lines
    return {**mean, "color": color, "label": f"{options['label']}, {text}"}


def selection_options(kwargs: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
    """Return the keywords for selection ``index`` of ``count``, without label and dashes."""
    options = dict(kwargs)
    for key in _COLORS:
        value = options.get(key)
        if isinstance(value, list) and len(value) == count:
            options[key] = value[index]
    if all(options.get(key) is None for key in _COLORS):
        options["color"] = _color(index, count)
    return options


def dashed(options: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    """Return ``options`` with a dashed line for valid, unless the caller chose a line style."""
    if any(key in options for key in _LINESTYLES):
        return dict(options)
    return {**options, "linestyle": "--" if phase is Phase.VALID else "-"}


def marked(options: Mapping[str, Any], index: int, values: NDArray[np.float64]) -> dict[str, Any]:
    """Return ``options`` with a marker on some values, which tells lines apart without colors."""
    if any(key in options for key in _MARKERS):
        return dict(options)
    step = max(1, len(values) // 8)
    places = {*range(index * 3 % step, len(values), step), *isolated_points(values).tolist()}
    marker = _SHAPES[index % len(_SHAPES)]
    return {**options, "marker": marker, "markersize": 5, "markevery": sorted(places)}


def _color(index: int, count: int) -> Any:
    """Return one of ``count`` colors that are as different as possible."""
    if count <= MAX_COLORS:
        return f"C{index}"
    # Neighbours differ in lightness too: there are fewer than twenty distinct hues.
    hue = index / count
    return colorsys.hls_to_rgb(hue, (0.32, 0.58, 0.45)[index % 3], (0.9, 0.75, 0.55)[index % 3])
