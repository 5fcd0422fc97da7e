"""Times and metrics as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def duration(seconds: float) -> str:
    """Return a time as people read it: ``757 ms``, ``37 s 757 ms``, ``03 m 09 s 048 ms``."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, rest = divmod(rest, 1000)
    if hours:
        return f"{hours:02d} h {minutes:02d} m {whole:02d} s"
    if minutes:
        return f"{minutes:02d} m {whole:02d} s {rest:03d} ms"
    if whole:
        return f"{whole:02d} s {rest:03d} ms"
    return f"{rest} ms"


def metrics_text(metrics: Mapping[str, float], names: Sequence[str] | None) -> str:
    """Return metrics in one line, those of ``names`` only, in their order."""
    chosen = metrics if names is None else {n: metrics[n] for n in names if n in metrics}
    return " | ".join(f"{name}: {value:.4f}" for name, value in chosen.items())
