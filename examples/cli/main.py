"""The digits example under LightningCLI: the callbacks come from a YAML file, no line of Python
knows them.

python examples/cli/main.py fit --config examples/cli/aws.yaml
python examples/cli/main.py fit --config examples/cli/wrs.yaml --trainer.max_epochs 5
python examples/cli/main.py fit --trainer.callbacks.help=lightning_normdyn.AdaptiveWeightShrink
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from lightning.pytorch.cli import ArgsType, LightningCLI

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the examples are a folder of scripts, not a package

from data_modules import Digits
from digits_resnet import ResidualDigits

from lightning_normdyn import NormDynamicsMonitor, NormDynError


def main(args: ArgsType = None) -> LightningCLI:
    warnings.filterwarnings(
        "ignore", message=".*does not have many workers.*"
    )  # the data lie in memory
    cli = LightningCLI(ResidualDigits, Digits, args=args, save_config_callback=None)
    for callback in cli.trainer.callbacks:
        if (
            isinstance(callback, NormDynamicsMonitor)
            and cli.trainer.is_global_zero
            and cli.trainer.log_dir is not None
        ):
            callback.history.save(
                f"{cli.trainer.log_dir}/history.npz"
            )  # a folder, or a URL such as s3://bucket/run
    return cli


if __name__ == "__main__":
    try:
        main()
    except (
        NormDynError,
        ModuleNotFoundError,
    ) as error:  # jsonargparse and scikit-learn come with lightning-normdyn[examples]
        sys.exit(f"error: {error}")
