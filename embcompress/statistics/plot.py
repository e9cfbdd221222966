"""Picture of a profile: how often ids occur, by rank."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from embcompress.statistics.profiles import Profile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROWS_OF_LEGEND = 20


def rank_figure(profile: Profile) -> Figure:
    """Counts against rank on logarithmic axes, a line for each feature.

    Lines of features whose counts are estimated are dashed. A power law is a straight line.
    """
    import matplotlib
    from matplotlib.figure import Figure

    features = sorted(profile.features, key=lambda name: -profile[name].seen())
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["viridis"]
    for number, name in enumerate(features):
        feature = profile[name]
        ranks, counts = feature.distribution().curve()
        law = feature.distribution().power_law()
        label = name if law is None else f"{name} ({law.exponent:.2f})"
        color = colors(0.92 * number / max(1, len(features) - 1))
        # A feature of one id is a point, which a line without a marker would not show.
        marker = "o" if len(ranks) == 1 else None
        style = "-" if feature.is_exact else "--"
        axes.plot(ranks, counts, style, marker=marker, color=color, linewidth=1.4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rank of the id")
    axes.set_ylabel("times the id occurs")
    title = f"{profile.source or 'profile'}: {profile.rows:,} rows"
    axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        title="feature (exponent)",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=8,
        ncols=-(-len(features) // _ROWS_OF_LEGEND),
    )
    return figure


def save_plot(profile: Profile, path: Path) -> None:
    """Write the picture as a PNG."""
    rank_figure(profile).savefig(path, dpi=130)
