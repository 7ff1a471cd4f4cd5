"""Do the packages that people use with Lightning work with these callbacks? Trains a model or an
optimizer of each, compares the monitor's angles with copies of the weights, and writes the table
docs/clients.md. Ends with an error if anything is wrong; what cannot be installed is skipped."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optimizers
import trained_by_packages
import transformer_models
from copies import Result, judge, measuring

from lightning_normdyn import NotSupportedError

PAGE = Path(__file__).resolve().parents[1] / "docs" / "clients.md"


def versions_of(packages: list[str]) -> dict[str, str]:
    """Versions by package, of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measured(client: str, train: Callable[[list[Any]], None]) -> Result:
    """Train with the monitor. An error without it is the client's own, and is skipped."""
    copies, monitor = measuring()
    try:
        train([copies, monitor])
    except NotSupportedError as refusal:
        return Result(client, "refused", str(refusal))
    except Exception as error:
        try:
            train([])
        except Exception as own_error:
            return Result(client, "skipped", f"does not train here by itself: {said(own_error)}")
        return Result(client, "wrong", f"fails only with the callbacks: {said(error)}")
    return judge(client, copies, monitor)


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def measured_optimizer(name: str, optimizer_class: type[Any]) -> Result:
    """The first way of constructing it with which it trains by itself counts."""
    problems = []
    for make in optimizers.ways_to_make(optimizer_class):
        for second_order in (False, True):
            try:
                optimizers.fit(make, [], second_order)
            except Exception as error:
                problems.append(said(error))
                continue

            def train(callbacks: list[Any], make: Any = make, order: bool = second_order) -> None:
                optimizers.fit(make, callbacks, order)

            return measured(name, train)
    return Result(name, "skipped", f"does not train here by itself: {problems[0]}")


def results(only: str) -> Iterator[tuple[str, Result]]:
    """One result per client, with its package."""
    models = {**trained_by_packages.MODELS, **transformer_models.MODELS}
    for package, by_name in models.items():
        if only in package and versions_of([package]):
            for name, train in by_name.items():
                yield package, measured(name, train)
    for package in optimizers.MODULES:
        if only in package and versions_of([package]):
            for name, optimizer_class in optimizers.classes_of(package):
                yield package, measured_optimizer(name, optimizer_class)


def page(found: list[tuple[str, Result]]) -> str:
    """The table as Markdown."""
    packages = [*trained_by_packages.MODELS, *transformer_models.MODELS, *optimizers.MODULES]
    versions = versions_of([*packages, "torch", "lightning", "pytorch-lightning"])
    missing = [package for package in packages if package not in versions]
    lines = [
        "# Clients",
        "",
        "What of other packages was trained with these callbacks, written by `make test-clients`."
        " *Right*: at every step the monitor's angle of every weight was that between copies of the"
        " weight from before and after the step (to 0.2%). *Refused*: the callbacks say by name why"
        " they cannot measure it. *Skipped*: it does not train here without the callbacks either."
        " Nothing is *wrong*: the run ends with an error otherwise.",
        "",
        ", ".join(f"{package} {number}" for package, number in versions.items()) + ".",
        "",
    ]
    if missing:
        lines += [f"Not installed, and skipped: {', '.join(missing)}.", ""]
    models = [(p, r) for p, r in found if p not in optimizers.MODULES]
    lines += ["## Models", "", *_models(models), "", "## Optimizers", ""]
    for package in optimizers.MODULES:
        mine = [result for p, result in found if p == package]
        if mine:
            lines += [f"### {package}", "", *_optimizers(mine), ""]
    return "\n".join(lines).rstrip() + "\n"


def _models(found: list[tuple[str, Result]]) -> list[str]:
    lines = [
        "| package | model | | weights | scale-invariant | steps |",
        "|---|---|---|---|---|---|",
    ]
    for package, r in found:
        cells = [package, r.client, _state(r), r.weights, r.scale_invariant, r.steps]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _optimizers(found: list[Result]) -> list[str]:
    right = [result.client for result in found if result.state == "right"]
    names = f": {', '.join(right)}" if right else ""
    lines = [f"{len(right)} of {len(found)} right{names}."]
    others = [result for result in found if result.state != "right"]
    if others:
        lines += ["", "| optimizer | |", "|---|---|"]
        lines += [f"| {result.client} | {_state(result)} |" for result in others]
    return lines


def _state(result: Result) -> str:
    why = result.why.replace("|", "\\|").replace("\n", " ")
    return f"{result.state}: {why}" if why else result.state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="packages whose name has this; writes no page")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    found = []
    # Packages write checkpoints and logs where they run.
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for package, result in results(arguments.only):
            print(f"{package:20} {result.client:40} {_state(result)}", flush=True)
            found.append((package, result))
        os.chdir(PAGE.parent)
    if not arguments.only:
        PAGE.write_text(page(found), encoding="utf-8")
    wrong = [f"{package} {result.client}" for package, result in found if result.state == "wrong"]
    print(f"{len(found)} clients, wrong: {', '.join(wrong) or 'none'}")
    return bool(wrong) or not found


if __name__ == "__main__":
    sys.exit(main())
