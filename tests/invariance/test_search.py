"""Which weights are targets: the zoo's truth, the truth of the truth, modes of running, patterns,
partitions, tables."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.geometry.vectors import Partition
from lightning_normdyn.invariance import search as targets
from lightning_normdyn.invariance.search import (
    EulerTest,
    ScaleInvarianceSearch,
    Verdict,
    choose_partition,
    filter_partition,
    inspect_module,
    is_gain,
    match_patterns,
    normalize_params,
    parameter_names,
    spread,
    targets_table,
    verify_scale_invariance,
)


def build(name: str, tiny_epsilons: bool = False):
    torch.manual_seed(0)
    module, inputs = zoo.CASES[name].make()
    if tiny_epsilons:
        for part in module.modules():
            if isinstance(getattr(part, "eps", None), float):
                part.eps = 1e-30
    return module, inputs


def summary(verdicts) -> dict[str, str]:
    return {v.name: f"{v.kind} {v.n}" if v.n else v.kind for v in verdicts}


class Emptied(nn.Module):
    """Its weight is there within its own forward and backward only, as DeepSpeed's stage 3 has
    it."""

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        weight, whole = self.convolution.weight, self.convolution.weight.data

        def fill(*_):
            weight.data = whole

        def empty(*_):
            weight.data = torch.empty(0)

        empty()
        self.convolution.register_forward_pre_hook(fill)
        self.convolution.register_forward_hook(empty)
        self.fill = fill

    def forward(self, x):
        return self.norm(self.convolution(x))


def test_a_weight_that_is_there_only_while_it_is_used_keeps_its_gradient():
    module = Emptied()
    with ScaleInvarianceSearch(module) as search:
        loss = module(torch.randn(2, 1, 5, 5)).pow(3).sum()
        search.analyze(loss)
        module.fill()
        loss.backward()
    assert search.verdicts["convolution.weight"].kind == "filter"
    assert module.convolution.weight.grad.shape == (4, 1, 3, 3)


# ------------------------------------------------------------------------------------------ the zoo


@pytest.mark.parametrize("name", zoo.CASES)
def test_the_table_equals_the_truth(name):
    module, inputs = build(name)
    verdicts = inspect_module(module, *inputs)
    expected = {**zoo.CASES[name].truth, **dict.fromkeys(zoo.CASES[name].misses, "no")}
    assert summary(verdicts) == expected
    for verdict in verdicts:
        assert (verdict.partition is None) == (verdict.kind in ("no", "unknown"))
        assert bool(verdict.reason) == (verdict.kind in ("no", "unknown", "partly"))
        assert bool(verdict.norms) >= (verdict.partition is not None)
        assert "failed" not in verdict.reason  # no rule met something unforeseen


def changes(module, inputs, name, factor) -> bool:
    """Whether multiplying one weight by ``factor`` changes the training-mode output, beyond
    rounding."""
    weight = dict(module.named_parameters())[name]
    with targets._restored(module), torch.no_grad():
        before = targets._outputs(module, inputs, None, 0)
    with targets._restored(module), torch.no_grad():
        weight.mul_(factor)
        after = targets._outputs(module, inputs, None, 0)
    return max(targets._change(a, b) for a, b in zip(before, after, strict=True)) > 1e-8


@pytest.mark.parametrize("name", zoo.CASES)
def test_the_truth_is_the_truth(name):
    """Brute force, without gradients or graphs: vectors may be scaled, each by its own factor;
    nothing finer and nothing else may."""
    module, inputs = build(name, tiny_epsilons=True)
    for verdict in inspect_module(module, *inputs):
        if verdict.kind == "unknown" or verdict.name in zoo.CASES[name].misses:
            continue

        def one(axis, index, verdict=verdict):
            factor = torch.ones(verdict.shape[axis], dtype=torch.float64)
            factor[index] = 2
            factor = factor.reshape([-1 if d == axis else 1 for d in range(len(verdict.shape))])
            return changes(module, inputs, verdict.name, factor)

        def some(axis, verdict=verdict):
            return {0, verdict.shape[axis] // 2, verdict.shape[axis] - 1}

        if verdict.partition is None:
            assert any(one(0, i) for i in some(0)), f"{verdict.name} is scale-invariant by row"
            assert any(one(1, i) for i in some(1)), f"{verdict.name} is scale-invariant by column"
            assert changes(module, inputs, verdict.name, torch.tensor(2.0)), (
                f"{verdict.name} is scale-invariant"
            )
            continue
        partition = verdict.partition
        factors = torch.exp2(2 * torch.rand(partition.n, dtype=torch.float64) - 1)
        assert not changes(
            module, inputs, verdict.name, spread(partition, factors, torch.empty(verdict.shape))
        ), f"{verdict.name} is not"
        if len(partition.keep) > 1:
            continue  # grouped transposed convolution: filters are the finest there is
        axis = partition.keep[0]
        for vector in range(partition.n):
            rows = (partition.labels == vector).nonzero().flatten().tolist()
            assert len(rows) == 1 or one(axis, rows[0]), (
                f"vector {vector} of {verdict.name} could be finer"
            )
        entries_of_a_column = torch.Size(verdict.shape).numel() // verdict.shape[1 - axis]
        if verdict.kind == "layer" and verdict.shape[1 - axis] > 1 and entries_of_a_column > 1:
            assert any(one(1 - axis, i) for i in some(1 - axis)), (
                f"the columns of {verdict.name} are free"
            )
        never_read = (
            torch.zeros_like(partition.labels)
            if verdict.unread is None
            else verdict.unread.labels + 1
        )
        outside = ((partition.labels < 0) & (never_read == 0)).nonzero().flatten().tolist()
        assert not outside or any(one(axis, i) for i in outside), (
            f"rows of {verdict.name} left out are free"
        )


def test_the_zoo_is_what_it_should_be():
    assert len(zoo.CASES) >= 20
    assert sum(case.after_freeze for case in zoo.CASES.values()) >= 10


def whole_zoo(*quick: str, leave_out: tuple[str, ...] = ()) -> list:
    """All networks; those that are not named here are slow."""
    names = [name for name in zoo.CASES if name not in leave_out]
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


# The experts' outputs are put into a float32 tensor, which torch refuses under autocast, with or
# without a search.
@pytest.mark.parametrize(
    "name",
    whole_zoo(
        "resnet_post",
        "group_norm_net",
        "layer_norm_mlp",
        "attention_with_qk_norm",
        "unet",
        "swin_v2",
        leave_out=("mixture_of_experts",),
    ),
)
def test_bf16_autocast_gives_the_same_table(name):
    module, inputs = build(name)
    module, inputs = (
        module.float(),
        tuple(x.float() if x.is_floating_point() else x for x in inputs),
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert summary(inspect_module(module, *inputs)) == zoo.CASES[name].truth


@pytest.mark.parametrize(
    "name",
    whole_zoo(
        "resnet_post", "dense_block", "attention_with_qk_norm", "hand_written_norms", "shuffle_unit"
    ),
)
def test_compiled_gives_the_same_table(name):
    torch.compiler.reset()
    module, inputs = build(name)
    compiled = torch.compile(module, backend="eager")
    compiled(*inputs)  # already compiled when the search starts
    assert summary(inspect_module(compiled, *inputs)) == zoo.CASES[name].truth
    module.compile(backend="eager")
    assert summary(inspect_module(module, *inputs)) == zoo.CASES[name].truth


# --------------------------------------------------------------------------------------- norm links


def small_net(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, **options), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False),
        nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def by_name(verdicts) -> dict[str, Verdict]:
    return {v.name: v for v in verdicts}


def test_links_say_what_evaluation_needs():
    """Rescale, correct the running statistics with the links, and evaluation is as before."""
    torch.manual_seed(0)
    net, x = small_net().double(), zoo.images(6)
    nn.init.normal_(net[0].bias)
    for _ in range(20):
        net(zoo.images(6))
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        before = net.eval()(x)
        for verdict in inspect_module(net, x):
            if verdict.partition is None:
                continue
            c = torch.exp2(2 * torch.rand(verdict.n, dtype=torch.float64) - 1)
            parameters[verdict.name].mul_(spread(verdict.partition, c, parameters[verdict.name]))
            assert verdict.batch_norms
            for link in verdict.batch_norms:
                norm, f = net.get_submodule(link.module), c[link.vector] ** link.degree
                b = parameters[link.bias] if link.offset else 0.0
                norm.running_mean.copy_(f * norm.running_mean + (1 - f) * b)
                norm.running_var.copy_(f**2 * (norm.running_var + norm.eps) - norm.eps)
        after = net(x)
    assert torch.allclose(before, after, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_links_name_the_bias(frozen):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.InstanceNorm2d(4, track_running_stats=True)
    )
    net[0].bias.requires_grad_(not frozen)
    (link,) = inspect_module(net, zoo.images().float())[0].batch_norms
    assert (link.module, link.vector.tolist(), link.offset, link.bias) == (
        "2",
        [0, 1, 2, 3],
        True,
        "0.bias",
    )


def test_link_through_concatenation_and_permutation():
    module, inputs = build("dense_block")
    links = {
        link.module: link
        for link in by_name(inspect_module(module, *inputs))["c.weight"].batch_norms
    }
    assert links["n2"].vector.tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize("name", ["chains_without_norm_in_between"])
def test_link_degree_and_shared_vector(name):
    module, inputs = build(name)
    link = by_name(inspect_module(module, *inputs))["a.weight"].batch_norms[0]
    assert (link.module, link.vector.tolist(), link.degree, link.offset) == (
        "n0",
        [0, 0, 0, 0],
        1,
        False,
    )


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.statistics = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.batch_norm(
            self.conv(x), self.statistics.running_mean, self.statistics.running_var, training=True
        )


def test_statistics_that_nobody_can_correct_are_flagged():
    verdict = by_name(inspect_module(Functional(), zoo.images().float()))["conv.weight"]
    assert verdict.kind == "filter"
    assert verdict.stale_statistics
    module, inputs = build("functional_norms")
    table = by_name(inspect_module(module, *inputs))
    assert not table["a"].stale_statistics  # no running statistics at all
    assert table["c"].stale_statistics


def test_a_norm_that_is_called_twice_is_linked_once():
    module, inputs = build("simsiam")
    search = ScaleInvarianceSearch(module)
    for _ in range(2):
        with search:
            search.analyze(module(*inputs))
    assert [link.module for link in search.verdicts["a.weight"].batch_norms] == ["n0"]
    assert not search.verdicts["a.weight"].stale_statistics
    net = zoo.Net(
        lambda m, x: m.n(m.a(x)) + m.n(m.a(x).flip(1)), a=zoo.conv(3, 4), n=nn.BatchNorm2d(4)
    )
    verdict = inspect_module(net, zoo.images())[0]
    assert verdict.kind == "filter"
    assert "different ways" in verdict.stale_statistics[0]


def test_a_changed_bias_makes_statistics_stale():
    net = zoo.Net(lambda m, x: m.n(2 * m.a(x)), a=zoo.conv(3, 4, bias=True), n=nn.BatchNorm2d(4))
    verdict = inspect_module(net, zoo.images())[0]
    assert verdict.kind == "filter"
    assert verdict.batch_norms[0].offset
    assert "not a plain bias" in verdict.stale_statistics[0]


# -------------------------------------------------------------------------- the search as an object


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.net, self.reentrant = small_net(), reentrant

    def forward(self, x):
        def inner(x):
            return checkpoint(self.net[:2], x, use_reentrant=self.reentrant)

        return self.net[2:](checkpoint(inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_seen_through_and_still_work(reentrant):
    from torch.utils import checkpoint as module

    apply = module.CheckpointFunction.apply
    torch.manual_seed(0)
    net, x = Checkpointed(reentrant), zoo.images().float().requires_grad_()
    plain = net.net(x).square().sum()
    expected = torch.autograd.grad(plain, net.net[0].weight)[0]
    search = ScaleInvarianceSearch(net)
    search.watch()
    loss = net(x).square().sum()
    search.analyze(loss)
    calls = []

    def computed_again(*_):  # must not be judged
        calls.append(1)
        search.analyze(loss)

    remove = net.net[0].register_forward_hook(computed_again)
    judged = dict(search.verdicts)
    search.close()
    loss.backward()  # nested checkpoints run again, after close
    remove.remove()
    assert calls
    assert search.verdicts == judged
    assert torch.allclose(net.net[0].weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert summary(search.verdicts.values()) == {
        "net.0.weight": "filter 4",
        "net.3.weight": "filter 4",
        "net.7.weight": "no",
    }
    assert module.CheckpointFunction.apply == apply


def test_embedding_rows_inside_a_checkpoint_are_not_claimed():
    """Which rows are read is saved inside the checkpoint; reading it would compute the checkpoint
    again."""
    embedding, norm, calls = nn.Embedding(7, 8), nn.LayerNorm(8), []

    def run(ids):
        calls.append(1)
        return norm(embedding(ids))

    net = zoo.Net(lambda m, ids: checkpoint(run, ids, use_reentrant=False), e=embedding, n=norm)
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(zoo.tokens()).sum())
    assert search.verdicts["e.weight"].kind == "no"
    assert "not known which rows are read" in search.verdicts["e.weight"].reason
    assert len(calls) == 1


def test_a_graph_that_hides_something_gives_no_claims():
    net, x = Checkpointed(True), zoo.images().float().requires_grad_()
    loss = (
        net(x).square().sum()
    )  # not watched: the checkpoint is one node, its weights are invisible
    search = ScaleInvarianceSearch(net)
    search.analyze(loss)
    assert not any(v.partition is not None for v in search.verdicts.values())
    assert "hides" in search.verdicts["net.3.weight"].reason


def test_everything_is_restored_after_an_exception():
    from torch.utils import checkpoint as module

    apply, net = module.CheckpointFunction.apply, small_net()
    search = ScaleInvarianceSearch(net)
    with pytest.raises(RuntimeError), search:
        net(torch.zeros(2, 5))  # fails inside a convolution
    assert module.CheckpointFunction.apply == apply
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    search.close()
    with search:  # and can be used again, with the module names right
        search.analyze(net(zoo.images().float()).sum())
    assert search.verdicts["0.weight"].norms == ("1",)


def test_the_graph_is_not_kept():
    net, x = small_net(), zoo.images().float()
    search = ScaleInvarianceSearch(net)
    search.watch()
    kept = net(x)
    activation = weakref.ref(kept)
    search.analyze(kept.sum())
    del kept
    gc.collect()
    assert activation() is None
    search.close()


def test_losses_are_combined():
    """GAN-like: a weight must be free in every loss; a weight in no loss stays undecided until a
    later batch holds it."""
    net = zoo.Net(
        lambda m, x: m.n(m.a(x)), a=zoo.linear(6, 4), n=nn.BatchNorm1d(4), later=zoo.linear(6, 4)
    )
    x = zoo.vectors()
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(x).square().sum())
        assert search.verdicts["a.weight"].kind == "filter"
        search.analyze(net.a.weight.square().sum())
        assert search.verdicts["a.weight"].kind == "no"
    assert search.verdicts["later.weight"].kind == "unknown"
    with search:
        search.analyze(net(net.later(x) @ torch.ones(4, 6, dtype=torch.float64)).sum())
    assert search.verdicts["a.weight"].kind == "no"  # for good
    assert search.verdicts["later.weight"].kind == "layer"


def test_a_gan_with_manual_optimization():
    generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
    discriminator = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.LayerNorm(8), nn.LeakyReLU(), nn.Linear(8, 1)
    )
    gan = nn.ModuleDict({"g": generator, "d": discriminator})
    z, real = torch.randn(8, 3), torch.randn(8, 6)
    search = ScaleInvarianceSearch(gan)
    with search:
        fake = generator(z)
        d_loss = (
            F.softplus(discriminator(fake.detach())).mean()
            + F.softplus(-discriminator(real)).mean()
        )
        search.analyze(d_loss)
        assert search.verdicts["g.0.weight"].kind == "unknown"
        d_loss.backward()
        g_loss = F.softplus(-discriminator(fake)).mean()
        search.analyze(g_loss)
        g_loss.backward()
    # The generator's last layer feeds a layer that is itself scale-invariant, but has a bias.
    assert summary(search.verdicts.values()) == {
        "g.0.weight": "filter 8",
        "g.3.weight": "no",
        "d.0.weight": "layer 1",
        "d.3.weight": "no",
    }


def test_unfreezing_a_norm_judges_afresh():
    net, x = small_net(), zoo.images().float()
    net[1].eval()
    search = ScaleInvarianceSearch(net)
    with search:
        search.analyze(net(x).sum())
    assert search.verdicts["0.weight"].kind == "no"
    assert "fixed mean" in search.verdicts["0.weight"].reason
    net[1].train()
    with search:
        search.analyze(net(x).sum())
    assert search.verdicts["0.weight"].kind == "filter"


def test_weights_used_without_their_module():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n = nn.Linear(6, 4, bias=False), nn.LayerNorm(4)

    net = Direct()
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net.n(F.linear(torch.randn(2, 6), net.a.weight)).square().sum())
    assert search.verdicts["a.weight"].kind == "layer"


def test_frozen_lazy_and_no_grad():
    net = nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(3), nn.BatchNorm1d(3))
    net[0].weight.requires_grad_(False)
    search = ScaleInvarianceSearch(net)
    assert list(search.verdicts) == ["0.weight"]
    assert "frozen" in search.verdicts["0.weight"].reason
    with search, torch.no_grad():
        search.analyze(net(torch.randn(4, 6)).sum())  # no graph at all
    with search:
        search.analyze(net(torch.randn(4, 6)).sum())
    assert summary(search.verdicts.values()) == {"0.weight": "unknown", "1.weight": "filter 3"}


# ------------------------------------------------------------------------------------ several ranks


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down, self.head = (
            nn.Linear(16, 32, bias=False),
            nn.Linear(32, 16, bias=False),
            nn.Linear(16, 3),
        )
        self.nq, self.nk, self.n0, self.n1 = (
            nn.LayerNorm(8),
            nn.LayerNorm(8),
            nn.LayerNorm(16),
            nn.LayerNorm(16),
        )

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x))).flatten(2)
        q, k, v = (
            part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.nq(q), self.nk(k), v).transpose(1, 2).flatten(2)
        x = x + self.n0(self.out(y))
        return self.head(x + self.n1(self.down(F.relu(self.up(x)))))


def found_on_a_rank(strategy: str) -> list[dict[str, str]]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    net = Attention()
    if strategy != "one":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if strategy == "DDP":
        net = nn.parallel.DistributedDataParallel(net)
    elif strategy == "FSDP1":
        net = FullyShardedDataParallel(
            net,
            use_orig_params=True,
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            device_id=torch.device("cpu"),
        )
    elif strategy == "FSDP2":
        for part in (net.q, net.k, net.v, net.out, net.up, net.down, net):
            fully_shard(part, mesh=mesh)
    elif strategy == "TP":
        columns, rows = (
            dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel()),
            dict.fromkeys(("out", "down"), RowwiseParallel()),
        )
        parallelize_module(net, mesh, columns | rows)
    search = ScaleInvarianceSearch(getattr(net, "module", net))
    tables = []
    for _ in range(2):  # FSDP shows other tensors in the second step
        search.watch()
        loss = net(torch.randn(2, 3, 4, 4)).square().sum()
        search.analyze(loss)
        tables.append(summary(search.verdicts.values()))
        search.agree()
        tables.append(summary(search.verdicts.values()))
        loss.backward()
        search.close()
    return tables


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("strategy", ["DDP", "FSDP1", "FSDP2", "TP"])
def test_strategies_give_the_same_table(strategy):
    def on_rank():
        ranks.init_process_group()
        return found_on_a_rank(strategy)

    alone = found_on_a_rank("one")[0]
    assert alone == {
        "conv.weight": "filter 4", "q.weight": "group 2", "k.weight": "group 2", "v.weight": "layer 1", "out.weight": "layer 1",
        "up.weight": "layer 1", "down.weight": "layer 1", "head.weight": "no",
    }  # fmt: skip
    for tables in ranks.run_ranks(on_rank).values():
        assert tables[1] == tables[3] == alone
        if (
            strategy == "TP"
        ):  # before the ranks agreed, nothing is claimed that only part of the rows was seen of
            assert tables[0]["q.weight"] == tables[0]["v.weight"] == "unknown"
        else:
            assert tables[0] == alone


def test_ranks_whose_graphs_differ_agree_on_what_holds_for_all():
    def on_rank():
        import torch.distributed as dist

        ranks.init_process_group()
        net = zoo.Net(
            lambda m, x: m.n(m.a(x)) if dist.get_rank() else m.n(m.a(x)) + m.b(x),
            a=zoo.linear(6, 4),
            b=zoo.linear(6, 4),
            n=nn.BatchNorm1d(4),
        )
        with ScaleInvarianceSearch(net) as search:
            search.analyze(
                net(zoo.vectors()).square().sum()
                + dist.get_rank() * net.a.weight[:2].square().sum()
            )
        search.agree()
        return [v.state() for v in search.verdicts.values()]

    first, second = ranks.run_ranks(on_rank).values()
    assert [v["kind"] for v in first] == ["partly", "no"]
    assert first[0]["partition"]["labels"].tolist() == [-1, -1, 0, 1]
    assert str(first) == str(second)


def test_one_process_agrees_with_itself():
    search = ScaleInvarianceSearch(small_net())
    before = dict(search.verdicts)
    search.agree()
    assert search.verdicts == before


# ----------------------------------------------------------------------------------------- function


def test_verify_restores_everything_bit_for_bit():
    net, x = small_net(), zoo.images().float()
    net.append(nn.Dropout(0.5))
    net[1].eval()
    net.double()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    grad = net[0].weight.grad = torch.randn_like(net[0].weight)
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    report = verify_scale_invariance(net, x.double())
    assert report
    assert len(report.claims) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net[0].weight.grad is grad
    assert verify_scale_invariance(
        net.eval(), x.double()
    )  # an evaluated net is looked at in training mode
    assert not any(m.training for m in net.modules())


def test_verify_finds_false_claims():
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.LayerNorm(8)).double()
    false = Verdict("0.weight", (8, 6), Partition.filters((8, 6)), "filter")
    report = verify_scale_invariance(net, zoo.vectors(), verdicts=[false])
    assert not report
    assert report.max_relative_change > 0.05
    assert verify_scale_invariance(net, zoo.vectors(), verdicts=[])


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, eps=1.0), zoo.Net(lambda m, x: x / (x.std(-1, keepdim=True) + 1.0))], ids=["LayerNorm", "by hand"]
)  # fmt: skip
def test_a_large_epsilon_is_marked_and_found_out(norm):
    net = nn.Sequential(nn.Linear(6, 8, bias=False), norm).double()
    (verdict,) = claims_of_the_graph(net, zoo.vectors())
    assert verdict.kind == "layer"
    assert verdict.eps
    assert "assumed" in targets_table([verdict])
    assert not verify_scale_invariance(net, zoo.vectors())
    assert inspect_module(net, zoo.vectors())[0].known == "function"


def claims_of_the_graph(net, *inputs) -> list[Verdict]:
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(*inputs).square().sum())
    return [v for v in search.verdicts.values() if v.partition is not None]


def squash(x):  # capsules
    squares = x.view(-1, 2, 4).square().sum(-1, keepdim=True)
    return squares / (1 + squares) * x.view(-1, 2, 4) / squares.sqrt()


# what the graph alone would claim: a number that it does not show, or a copy that it does not hold
ASSUMED = {
    "a padding value": lambda m, x: m.n(F.pad(m.a(x), (2, 2), value=3.0)),
    "a filling value": lambda m, x: m.n(m.a(x).masked_fill(torch.arange(12) > 4, 2.0)),
    "a condition": lambda m, x: m.n(torch.where(m.a(x) > 0.3, m.a(x), 0.1 * m.a(x))),
    "a detached copy": lambda m, x: m.a(x).detach() + m.n(m.a(x)),
    "a large epsilon": lambda m, x: F.layer_norm(m.a(x), (8,), eps=1.0),
    "a constant in a denominator": lambda m, x: m.a(x) / (1 + m.a(x).norm(dim=1, keepdim=True)),
    "a squashed capsule": lambda m, x: squash(m.a(x)),
    "ones to add to": lambda m, x: m.n(
        torch.ones(8, 8, dtype=x.dtype).index_reduce(0, torch.arange(8) % 3, m.a(x), "amax")
    ),
}


@pytest.mark.parametrize("what", ASSUMED)
def test_inspection_withdraws_what_the_function_contradicts(what):
    torch.manual_seed(0)
    width = 12 if "value" in what else 8
    norm = nn.LayerNorm(width) if "value" in what else nn.BatchNorm1d(width)
    net = zoo.Net(ASSUMED[what], a=zoo.linear(6, 8 if "padding" in what else width), n=norm)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert claims_of_the_graph(net, zoo.vectors())
    net.load_state_dict(before)
    (verdict,) = inspect_module(net, zoo.vectors())
    assert (verdict.kind, verdict.partition, verdict.known) == ("no", None, "function")
    assert re.search(r"says \w+, but the outputs change by [0-9.]+ of their size", verdict.reason)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.set_rng_state(state)


def test_inspection_keeps_claims_where_two_runs_differ():
    class Unsteady(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.calls * x

    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Unsteady())
    (verdict,) = inspect_module(net, torch.randn(8, 6))
    assert (verdict.kind, verdict.known) == ("filter", "graph")


def test_only_the_guilty_claim_is_withdrawn():
    net = zoo.Net(
        lambda m, x: m.n(m.a(x)) + (lambda y: y.detach() + m.n(y))(m.b(x)),
        a=zoo.linear(6, 8),
        b=zoo.linear(6, 8),
        n=nn.BatchNorm1d(8),
    )
    found = by_name(inspect_module(net, zoo.vectors()))
    assert (found["a.weight"].kind, found["a.weight"].known) == ("filter", "graph and function")
    assert (found["b.weight"].kind, found["b.weight"].known) == ("no", "function")


def test_sharded_weights_are_refused():
    whole = Verdict("0.weight", (16, 6), Partition.filters((16, 6)), "filter")
    with pytest.raises(
        NotSupportedError,
        match=r"`0.weight` is sharded \(Tensor of shape \(8, 6\), in full \(16, 6\)\).*on one process",
    ):
        verify_scale_invariance(nn.Sequential(nn.Linear(6, 8)), torch.randn(2, 6), verdicts=[whole])


def test_verify_with_a_loss():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    report = verify_scale_invariance(
        net, zoo.vectors(), loss=lambda out: out.square().mean() + net[0].weight.square().sum()
    )
    assert report.claims == ()
    assert report


def test_verify_sees_through_the_autocast_cache():
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    claim = Verdict("0.weight", (8, 6), Partition.filters((8, 6)), "filter")
    with torch.autocast("cpu", torch.bfloat16):
        assert not verify_scale_invariance(net, torch.randn(4, 6), verdicts=[claim])


# ------------------------------------------------------------------------------------------- number


def euler(module, inputs, name, partition, steps=8):
    test, weight = EulerTest(1), dict(module.named_parameters())[name]
    for _ in range(steps):
        module.zero_grad()
        out = module(*(x + 0.1 * torch.randn_like(x) for x in inputs))
        (out * torch.randn_like(out)).sum().backward()
        w, g = (t.detach().double().reshape(-1) for t in (weight, weight.grad))
        labels = (
            partition.labels.reshape(
                [n if d in partition.keep else 1 for d, n in enumerate(weight.shape)]
            )
            .expand(weight.shape)
            .reshape(-1)
        )
        sums = [
            torch.zeros(partition.n, dtype=torch.float64).index_add(0, labels, v)
            for v in (w * g, w * w, g * g, torch.ones_like(w))
        ]
        test.update(*sums, torch.zeros(partition.n, dtype=torch.long))
    return test


def test_euler_separates():
    module, inputs = build("group_norm_net")
    module, inputs = (
        module.float(),
        tuple(x.float() if x.is_floating_point() else x for x in inputs),
    )
    shape = tuple(module.a.weight.shape)
    right = euler(module, inputs, "a.weight", Partition.groups(shape, 2))
    assert right.rejected() == []
    assert right.result()[0][0] < 0.01
    assert euler(module, inputs, "a.weight", Partition.filters(shape)).rejected() == [0]
    assert euler(module, inputs, "fc.weight", Partition.layer((3, 4))).rejected() == [0]


def test_euler_skips_what_says_nothing_and_waits():
    test, index = EulerTest(2), torch.tensor([0, 0, 0, 1])
    one = torch.ones(4, dtype=torch.float64)
    test.update(one, one, torch.tensor([1.0, 0.0, float("nan"), 1.0]), 4 * one, index)
    assert test.result() == [(2.0, 1), (2.0, 1)]
    assert test.rejected() == []  # too few
    for _ in range(7):
        test.update(one, one, one, 4 * one, index)
    assert test.rejected() == [0, 1]
    withdrawn = Verdict("w", (4, 4), Partition.filters((4, 4)), "filter", norms=("bn",)).withdrawn(
        test.contradiction(*test.result()[0]), "gradients"
    )
    assert withdrawn.partition is None
    assert "bn says filter" in withdrawn.reason
    assert "= 2 over 22 values" in withdrawn.reason


# ------------------------------------------------------------------------------- names and patterns


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self._checkpoint_wrapped_module = inner


def test_parameter_names():
    net = nn.Sequential(
        nn.Linear(2, 2), Wrapper(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2), backend="eager")
    )
    net[2]._orig_mod.weight = net[0].weight
    names = parameter_names(net)
    assert names[net[0].weight] == ("0.weight", "2.weight")
    assert list(names.values())[2:] == [("1.weight",), ("1.bias",), ("2.bias",)]


NAMES = [
    ("layer1.0.conv1.weight",),
    ("layer1.0.conv2.weight",),
    ("layer2.conv.weight",),
    ("embed.weight", "head.weight"),
]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("auto", [0, 1, 2, 3]), ("layer1.*", [0, 1]), (["layer2.*", "*conv1*"], [0, 2]), (["*", "!*conv*"], [3]), (["!*conv*", "*"], [3]),
        ("!layer1.*", [2, 3]), ("head.*", [3]), ("embed.weight", [3]), (("*conv?.weight",), [0, 1]),
    ],
)  # fmt: skip
def test_match_patterns(params, expected):
    assert match_patterns(params, NAMES) == expected


@pytest.mark.parametrize(
    ("params", "nearest"),
    [
        ("layer1.0.conv3.weight", "layer1.0.conv"),
        (["*", "!heads.weight"], "head.weight"),
        ("Layer2*", "layer2"),
    ],
)
def test_a_pattern_without_a_match_names_what_is_there(params, nearest):
    with pytest.raises(
        NoTargetsError, match=r"matches none of the 4 weights: layer1\.0\.conv1\.weight"
    ) as error:
        match_patterns(params, NAMES)
    assert nearest in str(error.value).split("nearest")[1]


def test_a_pattern_where_there_is_nothing():
    with pytest.raises(NoTargetsError, match="there are none"):
        match_patterns("conv*", [], what="weights of two or more dimensions")


@pytest.mark.parametrize("params", [1, None, [], [1], "", "!", b"conv", {"a": 1}, ["auto", "!x"]])
def test_params_of_the_wrong_kind(params):
    with pytest.raises(ValueError, match="`params"):
        normalize_params(params)


# --------------------------------------------------------------------------------------- partitions


def test_filter_partition_finds_the_owner_under_wrappers_and_parametrizations():
    net = nn.Sequential(
        Wrapper(nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2))),
        nn.ConvTranspose2d(4, 3, 1),
        nn.Conv2d(4, 6, 1),
    )
    partition = filter_partition(net, "0.parametrizations.weight.original1", (4, 3, 3))
    assert partition.keep == (0, 1)
    assert partition.labels.tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert filter_partition(net, "1.weight", (4, 3, 1, 1)).n == 3
    assert filter_partition(net, "2.weight", (6, 4, 1, 1)).keep == (0,)


def verdict(kind: str) -> Verdict:
    shape = (4, 3)
    partitions = {
        "filter": Partition.filters(shape),
        "group": Partition.groups(shape, 2),
        "layer": Partition.layer(shape),
    }
    partitions["partly"] = Partition((0,), torch.tensor([0, 0, 1, -1]), "group")
    return Verdict("w", shape, partitions.get(kind), kind, norms=("n",))


FALLBACK = Partition.filters((4, 3))


@pytest.mark.parametrize(
    ("kind", "granularity", "labels"),
    [
        ("filter", "auto", [0, 1, 2, 3]), ("group", "auto", [0, 0, 1, 1]), ("no", "auto", [0, 1, 2, 3]),
        ("unknown", "filter", [0, 1, 2, 3]),
        ("unknown", "layer", [0, 0, 0, 0]), ("filter", "layer", [0, 0, 0, 0]), ("group", "layer", [0, 0, 0, 0]),
        ("group", "group", [0, 0, 1, 1]),
        ("partly", "auto", [0, 0, 1, -1]), ("partly", "layer", [0, 0, 0, -1]), ("layer", "layer", [0, 0, 0, 0]),
    ],
)  # fmt: skip
def test_choose_partition(kind, granularity, labels):
    assert choose_partition(verdict(kind), granularity, FALLBACK).labels.tolist() == labels


@pytest.mark.parametrize(
    ("kind", "granularity", "message"),
    [
        ("group", "filter", r"granularity='filter' was asked for `w`, but n makes it .* only per group.*Use granularity='auto' or 'group'"),
        ("layer", "filter", "only per layer"), ("layer", "group", "only per layer"), ("partly", "filter", "only per group"),
        ("filter", "group", r"no groups are known.*Use 'auto', 'filter' or 'layer'"),
        ("unknown", "group", "no normalization with groups is known"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(kind, granularity, message):
    with pytest.raises(NotSupportedError, match=message):
        choose_partition(verdict(kind), granularity, FALLBACK)


# --------------------------------------------------------------------------------- tables and state


def test_tables():
    module, inputs = build("attention_with_qk_norm")
    text = targets_table(inspect_module(module, *inputs))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "weight"
    row = next(line for line in lines if line.startswith("qkv.weight"))
    assert "24 x 8" in row
    assert "partly" in row
    assert "nk" in row
    assert "nq" in row
    narrow = targets_table(inspect_module(module, *inputs), width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert {line.split()[0] for line in lines} <= {line.split()[0] for line in narrow.splitlines()}


def test_verdicts_survive_a_checkpoint(tmp_path):
    module, inputs = build("style_transfer")
    found = inspect_module(module, *inputs)
    torch.save({v.name: v.state() for v in found}, tmp_path / "verdicts.pt")
    for name, state in torch.load(tmp_path / "verdicts.pt", weights_only=True).items():
        again, original = Verdict.from_state(name, state), by_name(found)[name]
        assert again.state().keys() == original.state().keys()
        assert (again.kind, again.norms, again.shape, again.reason) == (
            original.kind,
            original.norms,
            original.shape,
            original.reason,
        )
        assert again.partition is None or torch.equal(
            again.partition.labels, original.partition.labels
        )
        assert [(b.module, b.vector.tolist(), b.bias) for b in again.batch_norms] == [
            (b.module, b.vector.tolist(), b.bias) for b in original.batch_norms
        ]


# ------------------------------------------------------------------- rows that not every loss reads


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
    weights = dict(net.named_parameters())
    generator = torch.Generator().manual_seed(3)
    scaled = [(weights[v.name], v.partition) for v in verdicts if v.partition is not None]

    def factors(n):
        return torch.exp2(4 * torch.rand(n, generator=generator, dtype=torch.float64) - 2)

    def outputs(*scaled):
        generator.manual_seed(3)
        return [
            t
            for batch in batches
            for t in targets._outputs(net, (batch,), None, 0, scaled, factors)
        ]

    return targets._largest_change(outputs(), outputs(*scaled))


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


class Rescaling(nn.Module):
    """A lookup, or a linear map, that sets the length of its weight's rows in every forward
    pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(7, 8)), how

    def forward(self, ids):
        if self.how == "functional embedding":
            return F.embedding(ids, self.weight, max_norm=1.0)
        if self.how == "functional bag":
            return F.embedding_bag(ids, self.weight, max_norm=1.0)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))
        return F.one_hot(ids, 7).to(self.weight) @ self.weight


@pytest.mark.parametrize(
    ("lookup", "reason"),
    [
        (lambda: nn.Embedding(7, 8, max_norm=1.0), "max_norm of e rescales the rows"),
        (lambda: nn.EmbeddingBag(7, 8, max_norm=1.0), "max_norm of e rescales the rows"),
        (
            lambda: Rescaling("functional embedding"),
            "the forward pass of Rescaling writes it in place",
        ),
        (lambda: Rescaling("functional bag"), "the forward pass of Rescaling writes it in place"),
        (lambda: Rescaling("by hand"), "the forward pass of Rescaling writes it in place"),
    ],
)
def test_weights_that_the_forward_pass_rescales_are_not_claimed(lookup, reason):
    net = zoo.Net(lambda m, ids: m.n(m.e(ids)), e=lookup(), n=nn.LayerNorm(8))
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(zoo.tokens()).square().sum())
    verdict = search.verdicts["e.weight"]
    assert (verdict.kind, verdict.partition, verdict.unread) == ("no", None, None)
    assert reason in verdict.reason


GAINS = {
    "depthwise 1x1": (lambda: conv(4, 4, 1, groups=4), nn.BatchNorm2d(4)),
    "transposed depthwise 1x1": (
        lambda: nn.ConvTranspose2d(4, 4, 1, groups=4, bias=False),
        nn.BatchNorm2d(4),
    ),
    "Cx1x1": (lambda: Gain(4, 1, 1), nn.BatchNorm2d(4)),
    "Cx1x1x1": (lambda: Gain(4, 1, 1, 1), nn.BatchNorm2d(4)),
    "1xCx1x1": (lambda: Gain(1, 4, 1, 1), nn.BatchNorm2d(4)),
}


def conv(*shape: int, **options) -> nn.Conv2d:
    return nn.Conv2d(*shape, bias=False, **options)


class Gain(nn.Module):
    """A factor for each channel."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x):
        return x * self.weight.reshape(4, 1, 1)


@pytest.mark.parametrize("name", GAINS)
def test_single_numbers_have_no_direction(name):
    make, norm = GAINS[name]
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=make(), n=norm)
    verdict = inspect_module(net, zoo.images(4, 4))[0]
    assert (verdict.kind, verdict.partition) == ("no", None)
    assert "its rows are single numbers (a gain), which have no direction" in verdict.reason
    assert is_gain(net, "a.weight", verdict.shape)


def test_numbers_that_are_one_vector_have_a_direction():
    """The embedding of a number in front of a LayerNorm; a class token; a map to one number or one
    channel."""
    net = zoo.Net(lambda m, x: m.n(m.a(x)), a=zoo.linear(1, 6), n=nn.LayerNorm(6))
    assert [(v.kind, v.n) for v in inspect_module(net, zoo.vectors(8, 1))] == [("layer", 1)]
    layers = nn.ModuleDict(
        {"linear": nn.Linear(6, 1), "conv": nn.Conv2d(6, 1, 1), "up": nn.ConvTranspose2d(6, 1, 1)}
    )
    layers.token = nn.Parameter(torch.randn(1, 1, 6))
    for name, weight in layers.named_parameters():
        assert weight.ndim < 2 or not is_gain(layers, name, tuple(weight.shape))
