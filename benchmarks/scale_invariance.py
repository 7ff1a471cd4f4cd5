"""How often each way of telling scale-invariant weights is wrong, on the networks of tests/zoo.py,
and what the analysis costs.

    python benchmarks/scale_invariance.py            # prints the table and writes benchmarks/scale_invariance.md

- graph: this package, from the autograd graph of the first loss (its misses are listed in
  tests/zoo.py);
- Euler: the pooled test of <w, g> = 0 that this package holds against the graph's claims, used
  alone;
- AdamP: its rule per tensor and step, filter view first, then layer view: max |cos(w, g)| <
  0.1/sqrt(d).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import zoo  # noqa: E402

from lightning_normdyn import Partition  # noqa: E402
from lightning_normdyn.invariance.checks import inspect_module  # noqa: E402
from lightning_normdyn.invariance.euler import (  # noqa: E402
    EULER_COUNT,
    EULER_LIMIT,
    euler_sums,
    euler_values,
    rms_of,
    whole_values,
)
from lightning_normdyn.invariance.search import ScaleInvarianceSearch  # noqa: E402
from lightning_normdyn.invariance.verdict import Verdict  # noqa: E402

STEPS = 20


@dataclass
class Rates:
    """Hits and misses of one rule."""

    invariant: int = 0
    missed: int = 0
    other: int = 0
    false_hits: int = 0

    def show(self) -> tuple[str, str]:
        return f"{self.missed} of {self.invariant}", f"{self.false_hits} of {self.other}"


def vector_sums(partition: Partition, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """<w, g>, <w, w>, <g, g> and the length of every vector of a weight."""
    shape = [n if d in partition.keep else 1 for d, n in enumerate(w.shape)]
    labels = partition.labels.reshape(shape).expand(w.shape).reshape(-1)
    member = labels >= 0

    def total(v: Tensor) -> Tensor:
        return torch.zeros(partition.n, dtype=torch.float64).index_add(
            0, labels[member], v.reshape(-1)[member]
        )

    return total(w * g), total(w * w), total(g * g), total(torch.ones_like(w))


def adamp_view(w: Tensor, g: Tensor) -> str | None:
    """The view in which AdamP would project this tensor in this step."""
    for view, rows in (("filter", w.shape[0]), ("layer", 1)):
        a, b = w.reshape(rows, -1), g.reshape(rows, -1)
        cosine = (a * b).sum(1).abs() / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
        if cosine.max() < 0.1 / sqrt(a.shape[1]):
            return view
    return None


def right_views(verdict: Verdict) -> tuple[str, ...]:
    """The views of dim 0 in which this weight really is scale-invariant."""
    if verdict.partition is None or verdict.kind == "partly":
        return ()
    return (
        ("filter", "layer")
        if verdict.kind == "filter" and verdict.partition.keep == (0,)
        else ("layer",)
    )


def rates(bfloat16: bool) -> tuple[Rates, Rates, float]:
    """20 SGD steps of every network: the Euler test per weight, AdamP's rule per weight and step,
    the worst rms of an invariant weight."""
    euler, adamp, worst = Rates(), Rates(), 0.0
    for case in zoo.CASES.values():
        torch.manual_seed(0)
        module, inputs = case.make()
        module = module.float()
        inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                module(*inputs)
        except RuntimeError:
            continue  # a network that torch itself cannot run under autocast
        verdicts = {v.name: v for v in inspect_module(module, *inputs)}
        weights = dict(module.named_parameters())
        optimizer = torch.optim.SGD(
            [p for p in module.parameters() if p.requires_grad], lr=0.02, momentum=0.9
        )
        # Of z^2, and how many values.
        pooled = {name: torch.zeros(2, dtype=torch.float64) for name in verdicts}
        goal: Tensor | None = None
        for _ in range(STEPS):
            batch = tuple(
                x + 0.3 * torch.randn_like(x) if x.is_floating_point() else torch.randint_like(x, 7)
                for x in inputs
            )
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = module(*batch)
            output = output.float()
            goal = torch.randn_like(output) if goal is None else goal
            (output if output.ndim == 0 else (output - goal).square().mean()).backward()
            for name, verdict in verdicts.items():
                gradient = weights[name].grad
                if (
                    gradient is None
                    or verdict.kind == "unknown"
                    or "single numbers" in verdict.reason
                    or not gradient.any()
                ):
                    continue
                w, g = weights[name].detach().double(), gradient.double()
                partition = verdict.partition or Partition.layer(verdict.shape)
                wg, ww, gg, length = vector_sums(partition, w, g)
                mean, number = euler_values(euler_sums(ww, wg, gg, length).sum(1, keepdim=True))
                pooled[name] += torch.cat([mean * number, number])
                view, right = adamp_view(w, g), right_views(verdict)
                adamp.invariant += bool(right)
                adamp.missed += bool(right) and view is None
                adamp.other += 1
                adamp.false_hits += view is not None and view not in right
            optimizer.step()
        for name, verdict in verdicts.items():
            total, number = pooled[name].tolist()
            rms, count = rms_of(total, number), whole_values(number)
            if not count:
                continue
            rejected = count >= EULER_COUNT and rms > EULER_LIMIT
            if verdict.partition is not None:
                euler.invariant += 1
                euler.missed += rejected
                worst = max(worst, rms) if count >= 8 else worst
            else:
                euler.other += 1
                euler.false_hits += not rejected
    return euler, adamp, worst


def structure() -> Rates:
    """The graph's verdicts against the truth that tests/zoo.py writes down and
    tests/invariance/test_search.py proves."""
    found = Rates()
    for case in zoo.CASES.values():
        torch.manual_seed(0)
        module, inputs = case.make()
        for verdict in inspect_module(module, *inputs):
            truth = case.truth.get(verdict.name)
            if truth is None:
                continue
            invariant = truth not in ("no", "unknown") or verdict.name in case.misses
            found.invariant += invariant
            found.missed += invariant and verdict.partition is None
            found.other += not invariant
            found.false_hits += not invariant and verdict.partition is not None
    return found


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        self.body = nn.Sequential()
        for i, (a, b, k, s) in enumerate(sizes):
            self.body.extend(
                [nn.Conv2d(a, b, k, s, k // 2, bias=False), nn.BatchNorm2d(b)]
                + [nn.ReLU()] * (i < 2)
            )
        self.skip = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.n1, self.n2 = heads, nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.n1(x)).chunk(3, -1)
        )
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.n2(x))


def gpt(layers: int = 12, d: int = 512) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(256, d),
        *(Block(d, 8) for _ in range(layers)),
        nn.LayerNorm(d),
        nn.Linear(d, 256),
    )


def analysis_ms(module: nn.Module, batch: Tensor, repeats: int = 5) -> float:
    """Median milliseconds of reading one loss's graph (the forward pass is not counted)."""
    times = []
    for _ in range(repeats):
        with ScaleInvarianceSearch(module) as search:
            loss = module(batch).square().mean()
            start = time.perf_counter()
            search.analyze(loss)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--out", type=Path, default=HERE / "scale_invariance.md")
    out = arguments.parse_args().out
    torch.set_num_threads(1)
    lines = [
        "| rule | precision | scale-invariant weights missed | false hits |",
        "|---|---|---|---|",
    ]
    missed, false_hits = structure().show()
    lines.append(f"| graph (this package) | float64 | {missed} | {false_hits} |")
    notes = []
    for bfloat16 in (False, True):
        euler, adamp, worst = rates(bfloat16)
        precision = "bf16 autocast" if bfloat16 else "float32"
        lines.append(
            "| Euler test alone, {} steps | {} | {} | {} |".format(STEPS, precision, *euler.show())
        )
        lines.append(
            "| AdamP's rule, weight-steps | {} | {} | {} |".format(precision, *adamp.show())
        )
        notes.append(
            f"- Worst rms of the Euler test on a scale-invariant weight, {precision}: {worst:.3f} "
            f"(a claim is withdrawn above 0.1)."
        )
    resnet, transformer = (
        analysis_ms(resnet50(), torch.randn(2, 3, 64, 64)),
        analysis_ms(gpt(), torch.randint(256, (2, 32))),
    )
    notes.append(
        f"- Reading the graph, once per fit: ResNet-50 {resnet:.0f} ms, GPT of 12 layers of 512 "
        f"{transformer:.0f} ms."
    )
    text = "\n".join(
        [
            "# Which weights are scale-invariant: who is wrong how often",
            "",
            f"`python benchmarks/scale_invariance.py`, {platform.machine()}, one thread, torch "
            f"{torch.__version__}, seed 0; the "
            f"{len(zoo.CASES)} networks of tests/zoo.py, "
            f"{sum(c.after_freeze for c in zoo.CASES.values())} written after the rules.",
            "",
            *lines,
            "",
            *notes,
            "",
        ]
    )
    print(text)
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
