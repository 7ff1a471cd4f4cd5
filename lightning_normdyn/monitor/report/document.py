"""A page as one file: its template, the scripts that its policy names, and what is packed in it."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_FOLDER = Path(__file__).parent


def rendered(
    template: str,
    *,
    interactive: bool,
    data: object = None,
    **values: Any,
) -> str:
    """The text of a template beside this file, every value escaped.

    Args:
        template: name of the file.
        interactive: whether the page draws its charts itself: it then has Plotly's script.
        data: for the charts, as JSON can express it.
        values: for the template.

    Raises:
        FileNotFoundError: for an interactive page without Plotly; ask `plotly_script` before.
    """
    own, packed = _file("table.js"), None
    scripts = [own]
    if interactive:
        library = plotly_script()
        if library is None:
            raise FileNotFoundError("an interactive page needs the script of plotly.")
        scripts = [f"{own}{_file('charts.js')}", library.read_text(encoding="utf-8")]
        packed = {
            "plotly": _packed_file(library),
            "data": packed_text(json.dumps(data, separators=(",", ":"))),
        }

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        # Names of layers and runs are text, whatever markup they hold.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["policy_hash"] = policy_hash
    environment.filters["breakable"] = breakable
    # These are ours, and markup as they stand; the hash is of the very same text.
    marked = [Markup(script) for script in scripts]
    page = environment.get_template(template)
    return page.render(scripts=marked, style=Markup(_file("page.css")), packed=packed, **values)


def plotly_script() -> Path | None:
    """The script that Python's plotly package brings; None where it is not installed."""
    # Found, not imported: the import takes a second, and only this file is needed of it.
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js"
    return script if script.is_file() else None


def policy_hash(script: str) -> str:
    """What a Content-Security-Policy names a script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def breakable(name: str) -> Markup:
    """A parameter's name that breaks after its dots where it is longer than a line.

    Example:
        >>> breakable("stage1.<b>.weight")
        Markup('stage1.<wbr>&lt;b&gt;.<wbr>weight')
    """
    return Markup(".<wbr>").join(name.split("."))


def packed_text(text: str) -> str:
    """A text as the page holds it until its script unpacks it: compressed, in letters that no
    markup can hide in."""
    # Of Plotly's five megabytes two are left. No time in it: the same runs make the same page.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


@functools.lru_cache(maxsize=1)
def _packed_file(path: Path) -> str:
    return packed_text(path.read_text(encoding="utf-8"))


def _file(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
