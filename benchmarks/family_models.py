"""Small models of every registered type, as functions from token ids to logits."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import torch
import transformers
from family_configs import RESERVED_TOKENS, VOCABULARY, small_config
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from models.weights import random_model  # one definition of the random weights, shared with the tests

SEED = 0


def registered_types() -> list[str]:
    """Every model type with a causal language model class, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_model(model_type: str) -> nn.Module:
    """A small randomly initialised model of the type, fp32 and in evaluation mode; raises what its class raises."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = small_config(model_type)
    if not isinstance(config, model_class.config_class):
        config = config.get_text_config(decoder=True)  # a composite registered with its language model's class
    return random_model(lambda: model_class._from_config(config), SEED)


class TokensToLogits(nn.Module):
    """The forward that the sweep compares with: ids [B, T] int64 -> logits [B, T, V], without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in parameters else {}

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, **self.options).logits


def text(batch: int, length: int, seed: int = SEED) -> Tensor:
    """Random ids [batch, length] that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(RESERVED_TOKENS, VOCABULARY, (batch, length), generator=generator)
