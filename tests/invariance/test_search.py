"""Which weights are found: the zoo's truth, the truth of the truth, modes of running, links to
normalizations, several ranks, weights that the forward pass itself writes."""

from __future__ import annotations

import gc
import weakref

import pytest
import ranks
import torch
import torch.nn.functional as F
import zoo
from models import Net, fit, loader, make
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import build, by_name, small_net, summary

from lightning_normdyn import AdaptiveWeightShrink
from lightning_normdyn.invariance import checks
from lightning_normdyn.invariance.checks import inspect_module, spread
from lightning_normdyn.invariance.search import ScaleInvarianceSearch
from lightning_normdyn.invariance.visibility import restored


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
    run = checks.TrainingRun(module, inputs)
    before = run.outputs()
    with restored(module), torch.no_grad():
        weight.mul_(factor)
        after = run.outputs()
    return max(checks._change(a, b) for a, b in zip(before, after, strict=True)) > 1e-8


@pytest.mark.sampled(20)
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
        try:
            module(*inputs)
        except RuntimeError as error:
            # torch itself has no LSTM in bfloat16 for CPUs without AVX-512.
            if "could not create a primitive" not in str(error):
                raise
            pytest.skip(f"this CPU cannot run {name} in bfloat16")
        assert summary(inspect_module(module, *inputs)) == zoo.CASES[name].truth


@pytest.mark.sampled(2)
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


@pytest.mark.sampled(2)
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


class _Broken(nn.Module):
    def forward(self, x):
        raise ValueError("always")


def test_what_follows_a_forward_that_failed_is_not_its_own():
    def forward(m, x):
        y = m.a(x)
        with pytest.raises(ValueError, match="always"):
            m.b(y)
        return m.n(torch.nn.functional.gelu(y))

    net = zoo.Net(forward, a=zoo.linear(6, 6), b=_Broken(), n=nn.LayerNorm(6))
    with ScaleInvarianceSearch(net) as search:
        search.analyze(net(zoo.vectors()).sum())
    assert (
        search.verdicts["a.weight"].reason
        == "GeluBackward0 does not commute with a change of scale"
    )


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


class Table(Net):
    """A training step that looks up a table in front of a LayerNorm, without any module's
    forward."""

    def __init__(self, max_norm: float | None = None, bag: bool = False, **arguments):
        super().__init__(**arguments)
        self.table, self.child = (
            nn.Parameter(torch.randn(7, 8).double()),
            nn.Embedding(7, 8).double(),
        )
        self.max_norm, self.look_up = max_norm, F.embedding_bag if bag else F.embedding

    def training_step(self, batch, batch_idx=0):
        ids = torch.arange(7)[:, None]
        loss = super().training_step(batch)
        for table in (self.table, self.child.weight):
            read = F.layer_norm(self.look_up(ids, table, max_norm=self.max_norm), [8])
            weights = torch.linspace(0.1, 1.0, 8, dtype=torch.float64)
            loss = loss + (read @ weights).square().mean()
        return loss


def kinds(net: Table, losses: int = 1) -> dict[str, str]:
    search = ScaleInvarianceSearch(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batch = next(iter(loader()))
    with search:
        for _ in range(losses):
            loss = net.training_step(batch)
            search.analyze(loss)
            loss.backward()
            optimizer.step()
    return {name: search.verdicts[name].kind for name in ("table", "child.weight")}


@pytest.mark.parametrize("bag", [False, True], ids=["embedding", "bag"])
def test_a_table_that_a_training_step_rescales_is_not_claimed(bag):
    claimed = "layer" if bag else "filter"
    assert kinds(make(Table, bag=bag)) == {"table": claimed, "child.weight": claimed}
    assert kinds(make(Table, bag=bag, max_norm=0.5)) == {"table": "no", "child.weight": "no"}


def test_the_step_of_an_optimizer_between_two_losses_is_no_write_of_the_forward_pass():
    assert kinds(make(Table), losses=3) == kinds(make(Table))


def test_a_write_before_the_batch_is_none_of_the_forward_pass():
    net = make(Table)
    with torch.no_grad():
        net.table.mul_(2)
    assert kinds(net)["table"] == kinds(make(Table))["table"]


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_fit_leaves_such_a_table_alone(max_norm, capsys):
    fit(make(Table, max_norm=max_norm), [AdaptiveWeightShrink(0.01)], max_epochs=1)
    table_of_targets = capsys.readouterr().out
    assert "net.0.weight" in table_of_targets
    assert ("child.weight" in table_of_targets) is (max_norm is None)
