"""The pictures of a report, as parts of its page."""

from __future__ import annotations

import base64
import html
import io
import warnings
from typing import TYPE_CHECKING

from lightning_normdyn.monitor.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_curve(history: History, *quantities: str) -> bool:
    """Whether any layer has a curve of one of these quantities."""
    return any(
        key.startswith(f"{quantity}/") and len(history.column(key)[0])
        for key in history.keys()  # noqa: SIM118
        for quantity in quantities
    )


def picture(fig: Figure, alt: str) -> str:
    """A figure as an image that is part of the page."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from"
        )  # a name in a script the font lacks
        fig.savefig(file, format="png", dpi=110)
    return f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
