"""When the graph is read again: at once where it may help, and ever more rarely where it did
not. Rows that not every loss reads: nothing acts on them before one does, and then all of it goes
on."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from models import fit_batches as fit
from torch import nn

from lightning_normdyn import (
    AdaptiveWeightShrink,
    EffectiveLRReplay,
    NormDynamicsMonitor,
    StepBracket,
    WeightRescaling,
)
from lightning_normdyn.engine.looks import FIRST_LOOKS, Looks
from lightning_normdyn.errors import NormDynWarning, NoTargetsError
from lightning_normdyn.geometry.partition import Partition
from lightning_normdyn.optimizers.step import Step


def layer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    net = nn.Linear(3, 2)
    net.weight.grad = torch.ones(2, 3)
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def step_of(optimizer: torch.optim.Optimizer, number: int) -> Step:
    return Step(StepBracket.of(optimizer), number)


def batches(looks: Looks, count: int, **arguments: bool) -> list[int]:
    """The batches that are worth a look."""
    wanted = {"wanted": False, **arguments}
    return [batch for batch in range(count) if looks.begin_batch(**wanted)]


def test_nothing_calls_for_a_look():
    assert not batches(Looks(), 20)


def test_the_first_batches_and_then_exponentially_fewer():
    looks = Looks()
    seen = batches(looks, 200, wanted=True)
    assert seen[:FIRST_LOOKS] == list(range(FIRST_LOOKS))
    later = seen[FIRST_LOOKS - 1 :]
    assert all((b + 1) >= 1.5 * (a + 1) - 1 for a, b in pairwise(later))
    assert looks.taken == len(seen) < 20


def test_a_batch_without_a_loss_calls_for_the_next():
    looks = Looks()
    looks.seen(had_loss=False)
    assert batches(looks, 1) == [0]
    looks.seen(had_loss=True)
    assert not batches(looks, 5)


def test_new_weights_are_looked_at_however_often_it_was_looked_before():
    looks = Looks()
    batches(looks, 100, wanted=True)
    assert not looks.begin_batch(wanted=True)
    looks.ask_at_once()
    assert looks.begin_batch(wanted=False)


def test_a_weight_of_unknown_kind_is_missed_once_it_has_a_gradient():
    net, optimizer = layer()
    looks = Looks()
    looks.decided(0, [net.weight], {})
    assert not batches(looks, 1)
    looks.note_gradients(0, step_of(optimizer, 1), 0)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {})
    assert not batches(looks, 1)


def test_unread_rows_with_a_gradient_are_missed_until_fewer_are_unread():
    net, optimizer = layer()
    rows = Partition((0,), torch.tensor([-1, 0]), "filter")
    looks = Looks()
    looks.decided(0, [], {net.weight: rows})
    net.weight.grad[1] = 0.0
    looks.note_gradients(0, step_of(optimizer, 1), 0)
    assert not batches(looks, 1)
    net.weight.grad[1] = 1.0
    looks.note_gradients(0, step_of(optimizer, 2), 0)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {net.weight: rows})
    assert batches(looks, 1) == [0]  # the look has found nothing
    looks.decided(0, [], {})
    assert not batches(looks, 1)


def test_gradients_of_unread_rows_are_copied_to_the_host_at_logging_steps_only():
    net, optimizer = layer()
    looks = Looks()
    looks.decided(0, [], {net.weight: Partition((0,), torch.tensor([-1, 0]), "filter")})
    looks.note_gradients(0, step_of(optimizer, 100), 3)
    assert batches(looks, 1) == [0]
    looks.decided(0, [], {})
    looks.decided(0, [], {net.weight: Partition((0,), torch.tensor([-1, 0]), "filter")})
    looks.note_gradients(0, step_of(optimizer, 101), 3)
    assert not batches(looks, 1)


# --------------------------------------------------------------------------- rows that no loss has read


class Decoder(L.LightningModule):
    """Tokens and a table of positions, longer than the labels; ``normalized``: what is read of the
    table goes through a LayerNorm."""

    def __init__(
        self, normalized: bool, lr: float = 0.0, tied: bool = False, mixing: bool = True
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.position = nn.Embedding(5, 8), nn.Parameter(torch.randn(20, 8))
        self.norm = nn.LayerNorm(8, eps=1e-12) if normalized else nn.Identity()
        self.mix = (
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, eps=1e-12))
            if mixing
            else nn.Identity()
        )
        self.head = nn.Linear(8, 5)
        self.lr = lr
        self.to(torch.float64)

    def forward(self, ids):
        x = self.token(ids) + self.norm(self.position[: ids.shape[1]])
        return self.head(x + self.mix(x).tanh())

    def training_step(self, batch, batch_idx=0):
        return F.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def labels(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, (2, size), generator=generator) for size in sizes]


LONG = labels(20)[0]


@pytest.mark.parametrize("normalized", [False, True])
def test_rows_that_no_loss_reads_keep_the_function_of_longer_labels(normalized):
    """A Whisper whose table of positions is longer than its labels: rescaling must not change what
    it says to longer ones."""
    model, rule = Decoder(normalized), WeightRescaling(1)
    before = model(LONG).detach()
    fit(model, [rule], labels(12, 12))
    names = [t.name for t in rule.plans[0].targets]
    assert names == (["position", "mix.0.weight"] if normalized else ["mix.0.weight"])
    if normalized:
        assert torch.allclose(model.position[:12].norm(dim=1), torch.ones(12, dtype=torch.float64))
        assert not torch.allclose(
            model.position[12:].norm(dim=1), torch.ones(8, dtype=torch.float64)
        )
    assert torch.allclose(model(LONG), before, atol=1e-8)


def test_a_table_of_which_only_unread_rows_are_free_is_no_target():
    with pytest.raises(
        NoTargetsError, match=r"position: .*8 of its 20 rows not read by any loss so far"
    ):
        fit(
            Decoder(normalized=False, mixing=False, lr=0.1),
            [AdaptiveWeightShrink(0.1)],
            labels(12, 12),
        )


def test_numbers_of_all_scale_invariant_vectors_hold_no_unread_rows():
    monitor = NormDynamicsMonitor(1, tables=False)
    fit(Decoder(normalized=False, mixing=False, lr=0.1), [monitor], labels(12, 12))
    rows = list(monitor.history)
    assert "weight_norm/position" in rows[0]
    counts = {"normdyn/optimizer_step", "normdyn/collapsed_vectors", "normdyn/skipped_steps"}
    assert {key for row in rows for key in row if key.startswith("normdyn/")} <= counts


def test_rows_are_treated_once_a_loss_has_read_them():
    """What was counted and remembered of the rows that were known before stays."""
    model, rule = Decoder(normalized=True, lr=0.5), WeightRescaling(1, target_norm="initial")
    initial = model.position.detach().norm(dim=1)
    fit(model, [rule], labels(12, 12, 12, 20, 20, 20))
    (target,) = [t for t in rule.plans[0].targets if t.name == "position"]
    assert target.partition.n == 20
    assert target.verdict.kind == "filter"
    # Each row has the length that it had when it was first claimed: rows read from the start that
    # of the start.
    assert torch.allclose(model.position.norm(dim=1)[:12], initial[:12])
    drawn_out = rule.member.workers[0].lengths[:20]
    assert torch.allclose(drawn_out, model.position.norm(dim=1))
    assert (drawn_out[12:] > initial[12:]).all()


def test_counts_of_a_weight_that_gets_more_vectors_go_on():
    model, rule = Decoder(normalized=True, lr=1.0), AdaptiveWeightShrink(3.0)
    fit(model, [rule], labels(12, 12, 12, 20, 20, 20))
    counted = rule.plans[0].counters["clamped"]
    (where,) = [
        s
        for t, s in zip(rule.plans[0].targets, rule.plans[0].vectors.slices, strict=True)
        if t.name == "position"
    ]
    of_rows = counted[where].tolist()
    assert len(of_rows) == 20
    assert max(of_rows[12:]) < min(of_rows[:12])


def test_a_resumed_fit_remembers_which_rows_were_read(tmp_path):
    def rule():
        return WeightRescaling(1, target_norm="initial")

    def lengths_kept(rule):
        return rule.member.workers[0].lengths

    first = rule()
    runner = fit(
        Decoder(normalized=True, lr=0.5),
        [first],
        labels(12, 12, 15, 15),
        max_steps=4,
        max_epochs=-1,
    )
    runner.save_checkpoint(tmp_path / "at.ckpt")
    again, model = rule(), Decoder(normalized=True, lr=0.5)
    fit(
        model,
        [again],
        labels(5, 5, 5, 5, 5),
        ckpt_path=tmp_path / "at.ckpt",
        max_steps=7,
        max_epochs=-1,
    )
    (target,) = [t for t in again.plans[0].targets if t.name == "position"]
    assert (target.partition.n, target.verdict.kind) == (15, "partly")
    assert torch.equal(lengths_kept(first), lengths_kept(again))
    longer = rule()
    fit(
        Decoder(normalized=True, lr=0.5),
        [longer],
        labels(5, 20, 20, 5, 5),
        ckpt_path=tmp_path / "at.ckpt",
        max_steps=8,
        max_epochs=-1,
    )
    (target,) = [t for t in longer.plans[0].targets if t.name == "position"]
    assert (target.partition.n, target.verdict.kind) == (20, "filter")
    assert torch.equal(lengths_kept(longer)[:15], lengths_kept(first)[:15])


def test_a_record_is_replayed_on_rows_that_both_runs_have_read(tmp_path):
    batches, path = labels(12, 12, 12, 20, 20, 20, 20), tmp_path / "history.npz"
    monitor = NormDynamicsMonitor(1, per_vector=True, tables=False)
    fit(Decoder(normalized=True, lr=0.5), [monitor, AdaptiveWeightShrink(0.01)], batches)
    monitor.history.save(path)
    replay = EffectiveLRReplay(path)
    with pytest.warns(NormDynWarning) as warned:
        fit(Decoder(normalized=True, lr=0.5), [replay], batches)
    said = [str(w.message) for w in warned]
    assert [
        text
        for text in said
        if "leaves the steps of `position` alone: 8 of its 20 rows not read" in text
    ]
    assert [t.partition.n for t in replay.plans[0].targets if t.name == "position"] == [20]


def test_the_start_table_says_how_many_rows_were_not_read(capsys):
    fit(Decoder(normalized=True), [WeightRescaling(1)], labels(12))
    printed = " ".join(capsys.readouterr().out.split())
    assert "partly" in printed
    assert "8 of its 20 rows not read by any loss so far" in printed


class Codes(L.LightningModule):
    """Rows of a table, each normalized on its own in batches of even length and as one mean in
    others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codes, self.norm = nn.Parameter(torch.randn(6, 8)), nn.LayerNorm(8, eps=1e-12)
        self.head = nn.Linear(8, 3)
        self.to(torch.float64)

    def training_step(self, batch, batch_idx=0):
        rows = self.codes[batch]
        return self.head(self.norm(rows if len(batch) % 2 == 0 else rows.mean(0))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("granularity", ["auto", "filter"])
def test_rows_that_turn_out_to_be_one_vector_are_no_longer_treated_apart(granularity):
    apart, together = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 5])
    rule = WeightRescaling(1, params="codes", granularity=granularity)
    if granularity == "auto":
        fit(Codes(), [rule], [apart, apart, together, together, together])
        assert [(t.partition.n, t.verdict.kind) for t in rule.plans[0].targets] == [(1, "layer")]
        return
    with pytest.warns(
        NormDynWarning,
        match=r"leaves `codes` alone from now on\. granularity='filter' was asked for",
    ):
        fit(Codes(), [rule], [apart, apart, together, together, together])
    assert not rule.plans


class Experts(L.LightningModule):
    """Two of four experts, which the batch names, are added in front of a LayerNorm; ``other``:
    there is another target."""

    def __init__(self, other: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(4, 6, 8))
        self.body = (
            nn.Sequential(nn.Linear(6, 6, bias=False), nn.LayerNorm(6, eps=1e-12))
            if other
            else nn.Identity()
        )
        self.norm, self.head = nn.LayerNorm(8, eps=1e-12), nn.Linear(8, 3)
        self.to(torch.float64)

    def forward(self, chosen):
        tokens = self.body(
            torch.linspace(-1, 1, 6 * len(chosen), dtype=torch.float64).reshape(-1, 6).cos()
        )
        out = torch.zeros(len(chosen), 8, dtype=torch.float64)
        for expert in range(4):
            token, _ = torch.where(chosen == expert)
            out = out.index_add(0, token, tokens[token] @ self.experts[expert])
        return self.head(self.norm(out))

    def training_step(self, batch, batch_idx=0):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


EVEN, ODD = torch.tensor([[0, 2], [2, 0]]), torch.tensor([[0, 1], [1, 3]])


def test_experts_that_are_one_vector_wait_for_those_without_tokens():
    model, rule = Experts(), WeightRescaling(1)
    before, other = model.experts.detach().clone(), model(ODD).detach()
    with pytest.warns(
        NormDynWarning,
        match=r"leaves `experts` alone until all its rows were read: .* one vector .*2 of its 4",
    ):
        fit(model, [rule], [EVEN, EVEN, EVEN])
    assert [t.name for t in rule.plans[0].targets] == ["body.0.weight"]
    assert torch.equal(model.experts, before)
    assert torch.allclose(model(ODD), other, atol=1e-8)
    rule = WeightRescaling(1)
    with pytest.warns(NormDynWarning, match="leaves `experts` alone until"):
        fit(model, [rule], [EVEN, EVEN, ODD, ODD, EVEN])
    assert [(t.name, t.partition.n) for t in rule.plans[0].targets] == [
        ("experts", 1),
        ("body.0.weight", 1),
    ]
    assert torch.allclose(model.experts.norm(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(model(ODD), other, atol=1e-8)


def test_a_fit_whose_only_target_waits_to_the_end_says_so():
    model, rule = Experts(other=False), AdaptiveWeightShrink(0.1)
    with (
        pytest.warns(NormDynWarning, match="leaves `experts` alone"),
        pytest.warns(NormDynWarning, match="did nothing in this fit: `exp"),
    ):
        fit(model, [rule], [EVEN, EVEN])


def test_experts_that_a_person_names_are_one_vector():
    model, rule = Experts(), WeightRescaling(1, params="experts")
    other = model(ODD).detach()
    with pytest.warns(
        NormDynWarning,
        match=r"not known to be scale-invariant.*`experts`.*2 of its 4 rows not read",
    ):
        fit(model, [rule], [EVEN, EVEN])
    assert [(t.partition.n, t.by_request) for t in rule.plans[0].targets] == [(1, True)]
    assert torch.allclose(model(ODD), other, atol=1e-8)
    with pytest.raises(
        ValueError,
        match="granularity='filter' was asked for `experts`, but the rows that were read are one vector",
    ):
        fit(Experts(), [WeightRescaling(1, params="experts", granularity="filter")], [EVEN, EVEN])


def test_rows_that_never_get_a_gradient_cost_no_looks():
    model, rule = Decoder(normalized=True, lr=0.1), WeightRescaling(1)
    fit(model, [rule], labels(*[12] * 40))
    assert rule.member.session.looks.taken == 0
    model, rule = Decoder(normalized=True, lr=0.1), WeightRescaling(1)
    fit(model, [rule], labels(*[12] * 30, *[20, 12] * 10), log_every_n_steps=5)
    assert 1 <= rule.member.session.looks.taken <= 3
    assert [t.partition.n for t in rule.plans[0].targets if t.name == "position"] == [20]
