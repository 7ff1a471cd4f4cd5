"""Rows that not every loss reads: claimed only once they were read, on all ranks, also after a
resume."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from lightning_normdyn.invariance import checks
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.verdict import Verdict


def lengths(*sizes: int, d: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, size, d, dtype=torch.float64) for size in sizes]


def choices(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def experts(routes: str) -> zoo.Net:
    """A stack of four experts in front of a LayerNorm; a batch names one or two experts for each
    token."""

    def forward(m, x):
        tokens = (
            torch.linspace(-1, 1, x.shape[0] * 6, dtype=torch.float64).reshape(x.shape[0], 6).cos()
        )
        if routes == "alone":  # each token goes to one expert
            out = torch.zeros(len(tokens), 4, dtype=torch.float64)
            for e in range(4):
                out[x == e] = tokens[x == e] @ m.w[e]
        elif routes == "added":
            out = torch.zeros(len(tokens), 4, dtype=torch.float64)
            for e in range(4):
                token, _ = torch.where(x == e)
                out = out.index_add(0, token, tokens[token] @ m.w[e])
        else:  # gathered
            out = torch.einsum("td,tkde->te", tokens, m.w[x])
        return m.n(out)

    return zoo.Net(forward, w=zoo.weight(4, 6, 4), n=nn.LayerNorm(4))


def relative_positions(m, x):
    index = torch.arange(x.shape[1])
    return m.n(m.w[(index[:, None] - index[None]) + 5])


def read_and_normalize(read, *shape: int, norm=None) -> zoo.Net:
    """What ``read(weight, batch)`` gives goes through a LayerNorm, or another norm."""
    return zoo.Net(lambda m, x: m.n(read(m.w, x)), w=zoo.weight(*shape), n=norm or nn.LayerNorm(4))


def unequal_parts(w, x):
    return w.split([x.shape[1], 6 - x.shape[1]])[0]


def one_half(w, x):
    return (x.flatten(0, -2) @ w).chunk(2, -1)[0]


def columns(x):
    return x[:, None].expand(-1, 4)


SIZES, ROWS = lengths(3, 6), choices([0, 2], [1, 3, 4, 5])
PAIRS = choices([0, 2], [1, 3], [4, 5])
MASKS = choices([1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1])

# What is read of a table, or of another net; batches, the first of which is judged; its claim; what
# is claimed after all of them.
READINGS = {
    "slice": (lambda w, x: w[: x.shape[1]], SIZES, "partly 3", "filter 6"),
    "slice that is added": (lambda w, x: x + w[: x.shape[1]], SIZES, "no", "no"),
    "slice in a softmax": (lambda w, x: w[: x.shape[1]].softmax(-1), SIZES, "no", "no"),
    "slice from one on": (read_and_normalize(lambda w, x: w[:, 1 : x.shape[1]], 1, 6, 4), SIZES, "partly 2", "partly 5"),
    "slice of the last axis": (
        read_and_normalize(lambda w, x: w[:, :, : x.shape[1]].transpose(1, 2), 1, 4, 6), SIZES, "partly 3", "filter 6",
    ),
    "slice of the last axis, together": (
        read_and_normalize(lambda w, x: w[:, :, : x.shape[1]].flatten(1), 1, 4, 6, norm=nn.GroupNorm(1, 1, eps=1e-30, affine=False)),
        [t[..., 0] for t in SIZES], "unknown", "filter 1",
    ),
    "narrow": (lambda w, x: w.narrow(0, 0, x.shape[1]), SIZES, "partly 3", "filter 6"),
    "split": (unequal_parts, SIZES, "partly 3", "filter 6"),
    "tensor_split": (lambda w, x: w.tensor_split([x.shape[1]])[0], SIZES, "partly 3", "filter 6"),
    "unbind": (lambda w, x: torch.stack(w.unbind()[: x.shape[1]]), SIZES, "partly 3", "filter 6"),
    "one half of a chunk": (read_and_normalize(one_half, 4, 8), SIZES[:1], "unknown", "unknown"),
    "one half of a chunk, filters": (read_and_normalize(one_half, 4, 8, norm=nn.BatchNorm1d(4)), SIZES[:1], "partly 4", "partly 4"),
    "select": (lambda w, x: torch.stack([w[int(i)] for i in x]), ROWS, "partly 2", "filter 6"),
    "index": (lambda w, x: w[x], ROWS, "partly 2", "filter 6"),
    "index_select": (lambda w, x: w.index_select(0, x), ROWS, "partly 2", "filter 6"),
    "mask": (lambda w, x: w[x > 0], MASKS, "partly 2", "filter 6"),
    "masked_select": (lambda w, x: w.masked_select((x > 0)[:, None]).view(-1, 4), MASKS, "partly 2", "filter 6"),
    "gather": (lambda w, x: w.gather(0, columns(x)), ROWS, "partly 2", "filter 6"),
    "take_along_dim": (lambda w, x: torch.take_along_dim(w, x[:, None], 0), ROWS, "partly 2", "filter 6"),
    "take": (lambda w, x: w.take(4 * x[:, None] + torch.arange(4)), ROWS, "partly 2", "filter 6"),
    "embedding": (lambda w, x: F.embedding(x, w), ROWS, "partly 2", "filter 6"),
    "embedding, one row": (lambda w, x: F.embedding(x, w), choices([2], [1, 3, 4, 5]), "unknown", "partly 5"),
    "embedding, columns": (
        read_and_normalize(lambda w, x: F.embedding(x, w), 6, 4, norm=nn.BatchNorm1d(4)), choices([0, 2, 1], [3, 4, 5]),
        "unknown", "filter 4",
    ),
    "embedding, rows that meet": (lambda w, x: F.embedding(x, w).mean(0), PAIRS, "unknown", "layer 1"),
    "index, rows that meet": (lambda w, x: w[x].mean(0), PAIRS, "unknown", "layer 1"),
    "gather, rows that meet": (lambda w, x: w.gather(0, columns(x)).mean(0), PAIRS, "unknown", "layer 1"),
    "index, pairs that meet": (
        lambda w, x: w[x].unflatten(0, (-1, 2)).mean(1), choices([0, 1, 2, 3, 5, 5, 4, 4], [1, 2, 4, 5]), "layer 1", "layer 1",
    ),
    "index, an order of all rows": (
        lambda w, x: w[x].view(3, 2, 4).mean(1), choices([0, 1, 2, 3, 4, 5], [5, 3, 4, 2, 1, 0]), "layer 1", "layer 1",
    ),
    "bag": (lambda w, x: F.embedding_bag(x[None], w), ROWS, "unknown", "layer 1"),
    "relative positions": (zoo.Net(relative_positions, w=zoo.weight(11, 4), n=nn.LayerNorm(4)), SIZES, "partly 5", "filter 11"),
    "experts alone": (experts("alone"), choices([0, 2, 2, 0], [1, 3, 1, 3], [0, 1, 2, 3]), "partly 2", "filter 4"),
    "experts added": (experts("added"), choices([[0, 2], [2, 0]], [[0, 1], [1, 3]]), "unknown", "layer 1"),
    "experts gathered": (experts("gathered"), choices([[0, 2], [2, 0]], [[0, 1], [1, 3]]), "unknown", "layer 1"),
    "experts gathered in pairs": (experts("gathered"), choices([[0, 2], [1, 3]], [[0, 1], [1, 3]]), "layer 1", "layer 1"),
}  # fmt: skip


def scaled_outputs_change(net, batches, verdicts) -> float:
    """The largest relative change of the outputs of any of these batches when every claimed vector
    is scaled by its own factor."""
    generator = torch.Generator().manual_seed(3)

    def factors(n):
        return torch.exp2(4 * torch.rand(n, generator=generator, dtype=torch.float64) - 2)

    def outputs(*scaled):
        generator.manual_seed(3)
        found = []
        for batch in batches:
            found += checks.TrainingRun(net, (batch,)).outputs(scaled, factors)
        return found

    return checks.largest_change(outputs(), outputs(*verdicts))


def reading_net(name: str) -> nn.Module:
    read = READINGS[name][0]
    net = read if isinstance(read, nn.Module) else read_and_normalize(read, 6, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        net.w.normal_()
    for part in net.modules():
        if isinstance(getattr(part, "eps", None), float):
            part.eps = 1e-30
    return net


@pytest.mark.parametrize("name", READINGS)
def test_rows_are_claimed_only_when_a_loss_has_read_them(name):
    """Scaling what is claimed changes neither the outputs of the batch that was seen nor those of
    others, with other rows."""
    _, batches, first, last = READINGS[name]
    net = reading_net(name)
    search = ScaleInvarianceSearch(net)
    for number, batch in enumerate(batches):
        with search:
            search.analyze(net(batch).square().sum())
        verdict = next(iter(search.verdicts.values()))
        expected = first if number == 0 else last if number == len(batches) - 1 else None
        assert expected in (None, f"{verdict.kind} {verdict.n}".removesuffix(" 0"))
        if verdict.unread is not None:
            assert "not read by any loss so far" in verdict.reason
            if verdict.partition is not None:
                assert not ((verdict.partition.labels >= 0) & (verdict.unread.labels >= 0)).any()
        assert scaled_outputs_change(net, batches, [verdict]) < 1e-8


@pytest.mark.sampled(12)
@pytest.mark.parametrize("name", READINGS)
def test_a_checkpoint_keeps_which_rows_were_read(name):
    """A search that goes on from stored verdicts ends where one that saw all batches does."""
    _, batches, first, last = READINGS[name]
    net, stored = reading_net(name), {}
    for batch in batches:
        search = ScaleInvarianceSearch(net)
        search.take_up({n: Verdict.from_state(n, state) for n, state in stored.items()})
        with search:
            search.analyze(net(batch).square().sum())
        verdict = next(iter(search.verdicts.values()))
        stored = (
            {} if verdict.kind == "unknown" else {verdict.name: verdict.state()}
        )  # as callbacks store them
        assert scaled_outputs_change(net, batches, [verdict]) < 1e-8
    if first != "unknown":
        assert f"{verdict.kind} {verdict.n}".removesuffix(" 0") == last


def test_ranks_that_read_other_rows_agree_on_what_all_of_them_have_read(tmp_path):
    def on_rank():
        import torch.distributed as dist

        ranks.init_process_group()
        rank = dist.get_rank()
        tables = {
            "singles": (
                read_and_normalize(lambda w, x: w[x], 6, 4),
                [[0, 2], [1, 3]][rank],
                [[4], [5]][rank],
            ),
            "together": (
                read_and_normalize(lambda w, x: w[x].mean(0), 6, 4),
                [[0, 2], [1, 3]][rank],
                [[0, 4], [1, 5]][rank],
            ),
            "columns": (
                read_and_normalize(lambda w, x: w[:, :, : len(x)].transpose(1, 2), 1, 4, 6),
                [[0, 0], [0, 0, 0]][rank],
                [0] * 6,
            ),
        }
        said = {}
        for name, (net, first, second) in tables.items():
            search, said[name] = ScaleInvarianceSearch(net), []
            for batch in (first, second):
                with search:
                    search.analyze(net(torch.tensor(batch)).square().sum())
                search.agree()
                said[name].append(search.verdicts["w"])
            resumed = ScaleInvarianceSearch(net)
            resumed.take_up({"w": Verdict.from_state("w", said[name][-1].state())})
            with resumed:
                resumed.analyze(net(torch.tensor(first)).square().sum())
            resumed.agree()
            said[name].append(resumed.verdicts["w"])
        return {
            name: [f"{v.kind} {v.n} {v.unread_rows}" for v in verdicts]
            for name, verdicts in said.items()
        }

    first, second = ranks.run_ranks(on_rank).values()
    assert first == second
    assert first["singles"] == [
        "partly 4 2 of its 6 rows not read by any loss so far",
        "filter 6 ",
        "filter 6 ",
    ]
    assert first["together"] == [
        "unknown 0 2 of its 6 rows not read by any loss so far",
        "layer 1 ",
        "layer 1 ",
    ]
    assert first["columns"] == [
        "partly 3 3 of its 6 rows not read by any loss so far",
        "filter 6 ",
        "filter 6 ",
    ]
