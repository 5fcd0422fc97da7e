"""Which keywords of ``Axes.plot`` each line of a plot gets, from those that the caller gave.

Owns colors, dashes and labels; knows no figures and no recorded values.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import Any

from fitloop._types import Phase

_COLORS = ("color", "c")
_LINESTYLES = ("linestyle", "ls")
_WIDTHS = ("linewidth", "lw")
_MARKERS = ("marker", "markevery", "markersize", "ms")
_NO_LINE = ("", " ", "none", "None")
_PALE = 0.3
"""opacity of the values that a running mean is drawn over"""


def phase_options(kwargs: Mapping[str, Any], phase: Phase, num_lines: int) -> dict[str, Any]:
    """Return the keywords for one of the lines of train and valid."""
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
    alike = any(not (isinstance(color, list) and len(color) == 2) for color in colors)
    free = not any(key in kwargs for key in _LINESTYLES)
    if alike and free and num_lines > 1 and phase is Phase.VALID:
        options["linestyle"] = "--"
    return options


def pale_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords for the values that a running mean is drawn over."""
    opacity = options.get("alpha")
    pale = {**options, "alpha": _PALE * (1.0 if opacity is None else opacity)}
    if not any(key in options for key in _WIDTHS):
        pale["linewidth"] = 0.8
    return pale


def mean_options(options: Mapping[str, Any], color: Any, text: str) -> dict[str, Any]:
    """Return the keywords for a running mean: a line of ``color``, whatever the values are."""
    kept = {key: value for key, value in options.items() if key not in (*_MARKERS, *_COLORS)}
    for key in _LINESTYLES:
        if kept.get(key) in _NO_LINE:
            del kept[key]
    kept.setdefault("zorder", 2.5)  # over the values of every line
    return {**kept, "color": color, "label": f"{options['label']}, {text}"}


def entry_options(kwargs: Mapping[str, Any], place: int, count: int) -> dict[str, Any]:
    """Return the keywords for entry number ``place`` of ``count``, without label and dashes."""
    options = dict(kwargs)
    for key in _COLORS:
        value = options.get(key)
        if isinstance(value, list) and len(value) == count:
            options[key] = value[place]
    if all(options.get(key) is None for key in _COLORS):
        options["color"] = _color(place, count)
    return options


def dashed(options: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    """Return ``options`` with a line of valid dashed, unless the caller said how lines are."""
    if any(key in options for key in _LINESTYLES):
        return dict(options)
    return {**options, "linestyle": "--" if phase is Phase.VALID else "-"}


def _color(place: int, count: int) -> Any:
    """Return one of ``count`` colors that can be told apart, as far as that goes."""
    if count <= 10:
        return f"C{place}"
    # Neighbours in the list differ in lightness too: there are not twenty hues.
    hue = place / count
    return colorsys.hls_to_rgb(hue, (0.32, 0.58, 0.45)[place % 3], (0.9, 0.75, 0.55)[place % 3])
