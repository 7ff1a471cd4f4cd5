"""How the site is built: ``make docs``."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import lightning_normdyn

project = "lightning-normdyn"
author = "The lightning-normdyn authors"
release = lightning_normdyn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "myst_parser",
    "sphinx_copybutton",
]

myst_enable_extensions = ["dollarmath"]
# Links of the kind `page.md#a-heading` work as they do where the files are read as Markdown.
myst_heading_anchors = 3
suppress_warnings: list[str] = []

# Docstrings write a name in single backticks: it becomes a link where the name is documented.
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# A prompt is no part of what is copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"lightning-normdyn {release}"
html_copy_source = False
html_show_copyright = False


def tables_of_docstrings(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings have Markdown tables, which read well where they stand, and are no tables to
    Sphinx."""
    converted = []
    for is_table, group in groupby(lines, lambda line: line.startswith("|")):
        if not is_table:
            converted += group
            continue
        rows = [line.strip("| ").split(" | ") for line in group if not line.startswith("|-")]
        converted += [".. list-table::", "   :header-rows: 1", ""]
        for row in rows:
            converted += [
                f"   {'  -' if index else '* -'} {cell.strip()}" for index, cell in enumerate(row)
            ]
        converted.append("")
    lines[:] = converted


def setup(app: Any) -> None:
    # Before napoleon, which takes the lines as they are then.
    app.connect("autodoc-process-docstring", tables_of_docstrings, priority=400)
