"""Models of transformers, tiny and with random weights, in a LightningModule as people write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader
from trained_by_packages import TRAINER, Train

WORDS, LENGTH, BATCH = 48, 12, 4
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


class Finetuned(LightningModule):
    """Hands every batch to the model, whose output has the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)


def _tokens() -> torch.Tensor:
    return torch.randint(2, WORDS, (BATCH, LENGTH))


def _language() -> dict[str, Any]:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens}


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(BATCH, 8, 40), "labels": _tokens()}


def _classified() -> dict[str, Any]:
    return {"input_ids": _tokens(), "labels": torch.randint(2, (BATCH,))}


def _pictures() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(2, (BATCH,))}


def _transformer(
    config: str, model: str, batch: Callable[[], dict[str, Any]], **options: Any
) -> Train:
    def train(callbacks: list[Any]) -> None:
        import transformers

        torch.manual_seed(0)
        network = getattr(transformers, model)(getattr(transformers, config)(**options))
        network.train()
        batches = [batch() for _ in range(6)]
        trainer = Trainer(**TRAINER, callbacks=callbacks)
        trainer.fit(Finetuned(network), DataLoader(batches, batch_size=None))

    return train


MODELS: dict[str, dict[str, Train]] = {
    "transformers": {
        "WhisperForConditionalGeneration": _transformer(
            "WhisperConfig", "WhisperForConditionalGeneration", _speech,
            vocab_size=WORDS, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_source_positions=20, max_target_positions=LENGTH,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
        ),
        "Qwen3ForCausalLM": _transformer("Qwen3Config", "Qwen3ForCausalLM", _language, **DECODER),
        "Olmo2ForCausalLM": _transformer("Olmo2Config", "Olmo2ForCausalLM", _language, **DECODER),
        "Gemma3ForCausalLM": _transformer(
            "Gemma3TextConfig", "Gemma3ForCausalLM", _language, **DECODER
        ),
        "DebertaV2ForSequenceClassification": _transformer(
            "DebertaV2Config", "DebertaV2ForSequenceClassification", _classified,
            **SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"],
        ),
        "ResNetForImageClassification": _transformer(
            "ResNetConfig", "ResNetForImageClassification", _pictures,
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
        ),
    }
}  # fmt: skip
