"""Models of packages that bring a Trainer of their own: each is trained as its documentation shows,
with our callbacks where the package takes those of a user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

Train = Callable[[list[Any]], None]

TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def _gluonts(name: str, **options: Any) -> Train:
    def train(callbacks: list[Any]) -> None:
        import gluonts.torch
        from gluonts.dataset.common import ListDataset

        random = np.random.default_rng(0)
        series = [
            {"start": pd.Period("2020-01-01", freq="D"), "target": random.normal(size=120).cumsum()}
            for _ in range(4)
        ]
        estimator = getattr(gluonts.torch, name)(
            prediction_length=6,
            num_batches_per_epoch=6,
            batch_size=8,
            # It brings a checkpoint callback of its own.
            trainer_kwargs={**TRAINER, "enable_checkpointing": True, "callbacks": callbacks},
            **options,
        )
        estimator.train(ListDataset(series, freq="D"))

    return train


def _pytorch_forecasting(callbacks: list[Any]) -> None:
    from lightning.pytorch import Trainer
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "time": np.tile(np.arange(60), 3),
            "series": np.repeat(["a", "b", "c"], 60),
            "value": random.normal(size=180),
        }
    )
    data = TimeSeriesDataSet(
        frame,
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=12,
        max_prediction_length=4,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
        static_categoricals=["series"],
    )
    model = TemporalFusionTransformer.from_dataset(
        data, hidden_size=8, attention_head_size=2, hidden_continuous_size=4, learning_rate=0.01
    )
    trainer = Trainer(**TRAINER, limit_train_batches=6, callbacks=callbacks)
    trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))


def _scvi(name: str) -> Train:
    def train(callbacks: list[Any]) -> None:
        import anndata
        import scvi

        counts = np.random.default_rng(0).poisson(2.0, size=(96, 20)).astype("float32")
        cells = anndata.AnnData(counts)
        model_class = getattr(scvi.model, name)
        model_class.setup_anndata(cells)
        model = model_class(cells, n_hidden=16, n_latent=4)
        model.train(
            max_epochs=2,
            accelerator="cpu",
            batch_size=32,
            train_size=1.0,
            callbacks=callbacks,
            enable_progress_bar=False,
        )

    return train


def _darts(name: str, **options: Any) -> Train:
    def train(callbacks: list[Any]) -> None:
        import darts.models
        from darts import TimeSeries

        values = np.random.default_rng(0).normal(size=(80, 1)).cumsum(0).astype("float32")
        model = getattr(darts.models, name)(
            input_chunk_length=12,
            output_chunk_length=4,
            n_epochs=1,
            batch_size=16,
            pl_trainer_kwargs={
                "accelerator": "cpu",
                "callbacks": callbacks,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": False,
            },
            **options,
        )
        model.fit(TimeSeries.from_values(values))

    return train


def _pytorch_tabular(name: str, **options: Any) -> Train:
    def train(callbacks: list[Any]) -> None:
        import pytorch_tabular.models
        from pytorch_tabular import TabularModel
        from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig

        random = np.random.default_rng(0)
        frame = pd.DataFrame(random.normal(size=(96, 4)), columns=list("abcd"))
        frame["kind"] = random.choice(["x", "y", "z"], size=96)
        frame["label"] = (frame["a"] + frame["b"] > 0).astype(int)
        model = TabularModel(
            data_config=DataConfig(
                target=["label"], continuous_cols=list("abcd"), categorical_cols=["kind"]
            ),
            model_config=getattr(pytorch_tabular.models, name)(task="classification", **options),
            optimizer_config=OptimizerConfig(),
            trainer_config=TrainerConfig(
                accelerator="cpu",
                max_epochs=1,
                batch_size=16,
                checkpoints=None,
                early_stopping=None,
                load_best=False,
                progress_bar="none",
            ),
            verbose=False,
        )
        model.fit(train=frame, validation=frame, callbacks=callbacks)

    return train


# By package: what is trained, and how.
MODELS: dict[str, dict[str, Train]] = {
    "gluonts": {
        "DeepAREstimator": _gluonts("DeepAREstimator", freq="D", hidden_size=8),
        "PatchTSTEstimator": _gluonts("PatchTSTEstimator", patch_len=4, d_model=8, nhead=2),
        "TemporalFusionTransformerEstimator": _gluonts(
            "TemporalFusionTransformerEstimator", freq="D", hidden_dim=8, num_heads=2
        ),
    },
    "pytorch-forecasting": {"TemporalFusionTransformer": _pytorch_forecasting},
    "scvi-tools": {"SCVI": _scvi("SCVI"), "LinearSCVI": _scvi("LinearSCVI")},
    "darts": {
        "TCNModel": _darts("TCNModel", kernel_size=3, num_filters=4, weight_norm=True),
        "TiDEModel": _darts("TiDEModel", hidden_size=8, use_layer_norm=True),
    },
    "pytorch-tabular": {
        "CategoryEmbeddingModel": _pytorch_tabular(
            "CategoryEmbeddingModelConfig", layers="16-8", use_batch_norm=True
        ),
        "FTTransformer": _pytorch_tabular(
            "FTTransformerConfig", input_embed_dim=8, num_heads=2, num_attn_blocks=1
        ),
    },
}
