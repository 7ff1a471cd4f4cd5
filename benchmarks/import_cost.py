"""What `import lightning_normdyn` costs, alone and with all public names beside Lightning, and what
it brings along.

    python benchmarks/import_cost.py [--rounds 5] [--out import_cost.md]

Prints a Markdown table. Each round is a process of its own, in which `import lightning.pytorch` is
measured, too: on another machine the ratio to it says more than seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

# Bare first: Lightning would bring most of what it needs.
ROUND = """
import json, sys, time

def timed(do):
    # Of the CPU: what else the machine does at that moment is no cost of an import.
    start = time.process_time()
    do()
    return time.process_time() - start

def bare():
    import lightning_normdyn

def lightning():
    import lightning.pytorch

def names():
    import lightning_normdyn
    for name in lightning_normdyn.__all__:
        getattr(lightning_normdyn, name)

seconds = {"bare": timed(bare)}
alone = set(sys.modules)
seconds["lightning"] = timed(lightning)
before = set(sys.modules)
seconds["names"] = timed(names)
heavy = {"plotly", "matplotlib.pyplot", "wandb", "triton"}
brought = sorted(heavy & alone | heavy & set(sys.modules) - before)
print(json.dumps({**seconds, "brought": brought}))
"""
# Seconds that each may take.
MOST = {"bare": 0.15, "names": 0.4}


def one_round() -> dict:
    done = subprocess.run(
        [sys.executable, "-c", ROUND], check=True, capture_output=True, text=True, env=os.environ
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # One before the measured ones: it writes the bytecode that all later imports read.
    one_round()
    rounds = [one_round() for _ in range(options.rounds)]

    lines = [
        "| import | seconds of CPU, median | lowest | allowed | share of `import lightning.pytorch` |",
        "|---|---|---|---|---|",
    ]
    titles = {
        "bare": "`import lightning_normdyn`",
        "names": "all public names, beside Lightning",
        "lightning": "`import lightning.pytorch`",
    }
    for key, title in titles.items():
        seconds = [each[key] for each in rounds]
        share = statistics.median(each[key] / each["lightning"] for each in rounds)
        allowed = MOST.get(key, "-")
        lines.append(
            f"| {title} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {allowed} | "
            f"{share:.3f} |"
        )
    brought = sorted({name for each in rounds for name in each["brought"]})
    text = "\n".join(
        [
            "# What does an import cost?",
            "",
            f"`python benchmarks/import_cost.py --rounds {options.rounds}`, {date.today()}, "
            f"{platform.machine()}, torch {torch.__version__}.",
            "",
            *lines,
            "",
            "Of plotly, matplotlib.pyplot, wandb and triton, what it loads that "
            f"`import lightning.pytorch` does not: {', '.join(brought) or 'nothing'}.",
            "",
        ]
    )
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
