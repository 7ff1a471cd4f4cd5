"""Every multi-process strategy of Lightning on CPU ranks, a model that each of them can shard, and
a fit under any of them.

FSDP1 and DeepSpeed ask for a GPU; the subclasses here take that question out and nothing else.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from torch import Tensor, nn

TIMEOUT = timedelta(seconds=200)
BATCH = 12  # rows of a global batch, for up to four ranks
STEPS = 6


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on CPU ranks. Lightning's own check for a GPU looks at the exact class, so it does not
    see this one."""

    def setup_environment(self) -> None:
        shape = self.kwargs.pop("cpu_mesh", None)
        super().setup_environment()
        # Lightning casts modules and batches to float32; a float64 model stays one.
        self.precision_plugin.convert_module = lambda module: module
        self.precision_plugin.convert_input = lambda data: data
        if shape is not None:  # Lightning builds meshes for "cuda"
            from torch.distributed.device_mesh import init_device_mesh

            self.kwargs["device_mesh"] = init_device_mesh("cpu", shape)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),  # Lightning passes an index, which means a GPU
            **self.kwargs,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        from torch.distributed.fsdp import (
            FullStateDictConfig,
            FullyShardedDataParallel,
            StateDictType,
        )

        if self._state_dict_type == "sharded":
            return super().lightning_module_state_dict()
        # Lightning asks for offload_to_cpu=True, which ends in a segmentation fault where
        # everything is on the CPU already.
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=True)
        with FullyShardedDataParallel.state_dict_type(
            self.model, StateDictType.FULL_STATE_DICT, config
        ):
            return self.model.state_dict()


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeed on CPU ranks."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # without the check for a CUDA accelerator

    def setup_distributed(self) -> None:
        import deepspeed.ops
        from lightning.fabric.utilities.seed import reset_seed

        # DeepSpeed would compile a shared-memory backend, for a minute; gloo serves as well.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(deepspeed.ops.__compatible_ops__, False)
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # deepspeed.initialize asks for its index


class Block(nn.Module):
    """Two linear layers that tensor parallelism can split by columns and by rows, the second one in
    front of a normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 6, bias=False)
        self.down = nn.Linear(6, 7, bias=False)
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Convolutions in front of per-filter and grouped normalizations, then `Block`, then a head of
    a single filter. Few sizes divide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 5, 3, bias=False)
        self.conv_norm = nn.GroupNorm(5, 5)
        self.grouped = nn.ConvTranspose1d(5, 9, 2, bias=False)
        self.grouped_norm = nn.GroupNorm(3, 9)
        self.mix = nn.Conv1d(9, 1, 1, bias=False)
        self.block = Block()
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_norm(self.conv(x[:, None])))
        x = torch.tanh(self.grouped_norm(self.grouped(x)))
        return self.head(self.block(self.mix(x)[:, 0, :12]))


class ManyKinds(nn.Module):
    """Grouped and transposed convolutions, layers of few filters and of one, a filter of one entry;
    vectors of every granularity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 7, 3, bias=False)
        self.conv_norm = nn.GroupNorm(7, 7)
        self.transposed = nn.ConvTranspose1d(7, 14, 2, groups=7, bias=False)
        self.transposed_norm = nn.GroupNorm(7, 14)
        self.grouped = nn.Conv1d(14, 10, 3, groups=2, bias=False)
        self.grouped_norm = nn.GroupNorm(5, 10)
        self.one = nn.Conv1d(10, 1, 1, bias=False)
        self.one_norm = nn.LayerNorm(10)
        self.linear = nn.Linear(10, 3, bias=False)
        self.linear_norm = nn.LayerNorm(3)
        self.tall = nn.ConvTranspose1d(1, 3, 2, bias=False)
        self.tall_norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(12, 1)
        self.block = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = self.block(x[:, :1])
        x = torch.tanh(self.conv_norm(self.conv(x[:, None])))
        x = torch.tanh(self.transposed_norm(self.transposed(x)))
        x = torch.tanh(self.grouped_norm(self.grouped(x)))
        x = self.linear_norm(self.linear(self.one_norm(self.one(x)[:, 0])))
        return self.head(self.tall_norm(self.tall(x[:, None])).flatten(1)) + skipped


def batches(dtype: torch.dtype, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Global batches, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(steps, BATCH, 13, generator=generator, dtype=torch.float64)
    return [(a.to(dtype), a[:, :1].sin().to(dtype)) for a in x]


class Module(L.LightningModule):
    """`Net` on this rank's share of every global batch."""

    def __init__(
        self,
        optimizer: Callable[[Any], Any],
        dtype: torch.dtype,
        parallelize: Callable[..., None] | None,
        steps: int,
    ) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.net = Net().to(dtype)
        self.make_optimizer, self.dtype_, self.parallelize, self.steps = (
            optimizer,
            dtype,
            parallelize,
            steps,
        )
        self.final: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.parallelize is not None:
            self.parallelize(self.net, self.device_mesh)
            self.parallelize = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)

    def _share(self) -> list[Any]:
        share = self.trainer.strategy.distributed_sampler_kwargs
        count, rank = share["num_replicas"], share["rank"]
        return [
            (x.chunk(count)[rank], y.chunk(count)[rank])
            for x, y in batches(self.dtype_, self.steps)
        ]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self._share(), batch_size=None)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self._share()[:1], batch_size=None)

    def on_train_end(self) -> None:
        self.final = whole_weights(self)


def whole_weights(module: L.LightningModule) -> dict[str, Tensor]:
    """All weights, put together by the strategy's own means, under their own names."""
    with _summoned(module):
        found = {}
        for name, parameter in module.named_parameters():
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name.replace("_fsdp_wrapped_module.", "")] = value.detach().clone()
        return found


@contextmanager
def _summoned(module: L.LightningModule) -> Any:
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(strategy.model):
            yield
    elif any(hasattr(p, "ds_id") for p in module.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            yield
    else:
        yield


# --------------------------------------------------------------------------------------- strategies


def _tensor_parallel(net: Net, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    parallelize_module(
        net.block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def _fully_shard(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.block, mesh=mesh["data_parallel"])
    fully_shard(net, mesh=mesh["data_parallel"])


def _fully_shard_by_columns(net: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    ranks = mesh["data_parallel"]

    def last_if_it_divides(parameter: nn.Parameter) -> Any:
        return (
            Shard(parameter.ndim - 1)
            if parameter.ndim > 1 and parameter.shape[-1] % ranks.size() == 0
            else None
        )

    fully_shard(net, mesh=ranks, shard_placement_fn=last_if_it_divides)


def _both(net: Net, mesh: Any) -> None:
    _tensor_parallel(net, mesh)
    _fully_shard(net, mesh)


def _hybrid(net: Net, mesh: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hybrid = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net.block, mesh=hybrid)
    fully_shard(net, mesh=hybrid)


@dataclass(frozen=True)
class Strategy:
    """How to run a fit on several ranks.

    Args:
        world: number of ranks.
        make: the strategy, made anew in every rank.
        parallelize: what `configure_model` does.
        zero_redundancy: wrap the optimizer in torch's ZeroRedundancyOptimizer.
        dtypes: what the strategy can train in.
    """

    world: int
    make: Callable[[], Any]
    parallelize: Callable[..., None] | None = None
    zero_redundancy: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)


def _ddp() -> Any:
    return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)


def _model_parallel(data: int, tensor: int) -> Callable[[], Any]:
    return lambda: ModelParallelStrategy(
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        process_group_backend="gloo",
        timeout=TIMEOUT,
    )


def fsdp1(sharding: str, units: bool = True, **kwargs: Any) -> Callable[[], Any]:
    """FSDP1, with units of their own for the blocks and layers or one for everything."""
    from torch.distributed.fsdp import MixedPrecision

    return lambda: CPUFSDPStrategy(
        sharding_strategy=sharding,
        auto_wrap_policy={Block, nn.Linear} if units else None,
        mixed_precision=MixedPrecision(),  # likewise
        process_group_backend="gloo",
        timeout=TIMEOUT,
        **kwargs,
    )


def _deepspeed(stage: int) -> Callable[[], Any]:
    def make() -> Any:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
        }
        if stage:
            config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        return CPUDeepSpeedStrategy(config=config, process_group_backend="gloo", timeout=TIMEOUT)

    return make


STRATEGIES: dict[str, Strategy] = {
    "ddp": Strategy(2, _ddp),
    "ddp, ZeroRedundancyOptimizer": Strategy(2, _ddp, zero_redundancy=True),
    "FSDP2": Strategy(2, _model_parallel(2, 1), _fully_shard),
    "HSDP": Strategy(4, _model_parallel(4, 1), _hybrid),
    "FSDP2, 3 ranks": Strategy(3, _model_parallel(3, 1), _fully_shard),
    "FSDP2 by columns": Strategy(2, _model_parallel(2, 1), _fully_shard_by_columns),
    "TP": Strategy(2, _model_parallel(1, 2), _tensor_parallel),
    "FSDP2 + TP": Strategy(4, _model_parallel(2, 2), _both),
    "FSDP1 FULL_SHARD": Strategy(2, fsdp1("FULL_SHARD")),
    "FSDP1 FULL_SHARD, one unit": Strategy(2, fsdp1("FULL_SHARD", units=False)),
    "FSDP1 FULL_SHARD, one unit, 3 ranks": Strategy(3, fsdp1("FULL_SHARD", units=False)),
    "FSDP1 SHARD_GRAD_OP": Strategy(2, fsdp1("SHARD_GRAD_OP")),
    "FSDP1 NO_SHARD": Strategy(2, fsdp1("NO_SHARD")),
    "FSDP1 HYBRID_SHARD": Strategy(4, fsdp1("HYBRID_SHARD", cpu_mesh=(2, 2))),
}
DEEPSPEED: dict[str, Strategy] = {
    f"DeepSpeed ZeRO-{stage}": Strategy(2, _deepspeed(stage), dtypes=(torch.float32,))
    for stage in range(4)
}


def with_ranks(strategy: Strategy, world: int) -> Strategy:
    """The strategy on more ranks."""

    def make() -> Any:
        made = strategy.make()
        if isinstance(made, ModelParallelStrategy):
            made._data_parallel_size = world
        return made

    return replace(strategy, world=world, make=make)


def fit(
    strategy: Strategy,
    callbacks: Callable[[], list[Any]],
    *,
    dtype: torch.dtype = torch.float64,
    optimizer: Callable[[Any], Any] | None = None,
    steps: int = STEPS,
    ckpt_path: str | None = None,
    model: Callable[..., Module] = Module,
    **arguments: Any,
) -> tuple[L.Trainer, Module, list[Any]]:
    """A fit in this rank; ``model.final`` are the weights at its end."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def make_optimizer(module: Module) -> Any:
        made = sgd(module) if optimizer is None else optimizer(module)
        if not strategy.zero_redundancy:
            return made
        groups = [{**g} for g in made.param_groups]
        return ZeroRedundancyOptimizer(groups, type(made), lr=made.defaults["lr"])

    made = callbacks()
    module = model(make_optimizer, dtype, strategy.parallelize, steps)
    defaults = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "logger": False,
        "limit_val_batches": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=world_size(),
            strategy=strategy.make(),
            callbacks=made,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{**defaults, **arguments},
        )
        trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module, made


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def adamw(module: Any) -> Any:
    """Two groups with their own learning rate and decay, in the module's order."""
    first = [p for name, p in module.named_parameters() if "conv" in name]
    ours = {id(p) for p in first}
    rest = [p for p in module.parameters() if id(p) not in ours]
    return torch.optim.AdamW(
        [{"params": first, "lr": 0.02, "weight_decay": 0.05}, {"params": rest}],
        lr=0.01,
        weight_decay=0.01,
    )


def world_size() -> int:
    """Number of ranks. Lightning deletes the variable at the end of a fit."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
