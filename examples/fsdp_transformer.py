"""Train the transformer of char_gpt.py sharded with FSDP2 (Lightning's ModelParallelStrategy), on
GPUs or on CPU ranks.

    python examples/fsdp_transformer.py --devices 2 --accelerator cpu
    python examples/fsdp_transformer.py --devices 8 --preset paper

Each weight is cut by rows over the ranks. The callbacks work on the shards where a head's rows lie
on one rank, and sum over the ranks where the cut goes through a head; the curves and the weights
are those of one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import char_gpt
import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from running import Run, build_callbacks, fit, parse, parser, run_as_script
from torch.distributed.fsdp import FSDPModule, fully_shard


class ShardedGPT(char_gpt.CharGPT):
    """CharGPT with each block, and then the rest, sharded over the data-parallel ranks."""

    def configure_model(self) -> None:
        if isinstance(self.network, FSDPModule):
            return  # Lightning calls this again for a second fit or a test
        mesh = self.device_mesh["data_parallel"]
        for block in self.network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("fsdp_transformer", __doc__.splitlines()[0])
    char_gpt.add_text_flags(p)
    args = parse(p, char_gpt.PRESETS, argv)
    L.seed_everything(args.seed, verbose=False)
    data = char_gpt.text_data(args)
    module = ShardedGPT(
        len(data.characters),
        args.context,
        args.width,
        args.layers,
        args.heads,
        args.norm,
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
    callbacks = build_callbacks(args.method, alpha=args.alpha, every_n_steps=args.every_n_steps)
    # Left to itself, Lightning would take the ranks of one machine for tensor parallelism, and
    # shard nothing here.
    strategy = ModelParallelStrategy(data_parallel_size=args.devices, tensor_parallel_size=1)
    return fit(module, data, args, callbacks, strategy=strategy)


if __name__ == "__main__":
    run_as_script(main)
