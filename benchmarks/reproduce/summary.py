"""Collect the claims of all tables of this folder, with their outcomes, into README.md.

python benchmarks/reproduce/summary.py

A full run of any script does the same by itself; after a table came in another way (a merge), run
this.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
START, END = "<!-- claims: written by summary.py -->", "<!-- end of claims -->"


class Claim(NamedTuple):
    text: str
    measured: str
    outcome: str  # "yes", "**no**" or "-" (looked at, not judged)
    why: str  # a guess, where it does not hold


def claims_of(table: str) -> list[Claim]:
    """The first table of ``<script>.md``, as desk.Report writes it, and the guesses below it."""
    whys = dict(re.findall(r"^\*(.+):\* not reproduced\. Perhaps: (.+)$", table, re.MULTILINE))
    lines = table.splitlines()
    first = lines.index("| claim | measured here | reproduced |") + 2
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        text, measured, outcome = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        found.append(
            Claim(
                text, measured, outcome, whys.get(text.replace("\\|", "|"), "").replace("|", "\\|")
            )
        )
    return found


def summary(folder: Path = HERE) -> str:
    """Every claim of every table in the folder, as Markdown between :data:`START` and
    :data:`END`."""
    tables = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted(folder.glob("*.md"))
        if path.name != "README.md"
    }
    claims = {name: claims_of(text) for name, text in tables.items()}
    outcomes = [claim.outcome for found in claims.values() for claim in found]
    yes, no = outcomes.count("yes"), outcomes.count("**no**")
    parts = [
        START,
        "",
        f"{yes} of {len(outcomes)} hold here, {no} do not, {len(outcomes) - yes - no} are shown "
        f"and not judged.",
        "",
    ]
    for name, found in claims.items():
        title = tables[name].partition("\n")[0].removeprefix("# ")
        parts += [
            f"**{title}** ([{name}]({name}.md))",
            "",
            "| claim | measured here | reproduced |",
            "| --- | --- | --- |",
        ]
        parts += [
            f"| {c.text} | {c.measured} | {c.outcome}{f'. Perhaps: {c.why}' if c.why else ''} |"
            for c in found
        ]
        parts.append("")
    return "\n".join([*parts, END])


def refresh(folder: Path = HERE) -> None:
    """Write the summary into the folder's README.md."""
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(
        text[: text.index(START)] + summary(folder) + text[text.index(END) + len(END) :],
        encoding="utf-8",
    )


if __name__ == "__main__":
    refresh()
