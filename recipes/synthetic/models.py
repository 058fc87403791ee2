"""Llama-style models for the tasks, with every method and every kind of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
)

import hf_asentmax
from recipes.synthetic import stick_breaking
from recipes.synthetic.tasks import Batch, MaxRetrieval, Task

__all__ = ["METHODS", "POSITIONS", "alibi_heads", "build_model", "load_model", "outputs_at"]

# The fields of ASEntmaxConfig for each method. All methods run through the plugin's attention, with the same positions.
_FLAGS: dict[str, dict[str, Any]] = {
    "softmax": {"alpha": 1.0, "scaling": "none"},
    "ssmax": {"alpha": 1.0, "scaling": "ssmax"},
    "adaptive_temperature": {"alpha": 1.0, "scaling": "adaptive_temperature"},
    "topk": {"alpha": 1.0, "scaling": "none", "top_k": 16},
    "entmax": {"alpha": 1.5, "scaling": "none"},
    "asentmax": {"alpha": 1.5, "scaling": "asentmax"},
}
METHODS = (*_FLAGS, stick_breaking.NAME)
_POSITIONS = {"rope": "model", "nope": "nope", "alibi": "alibi", "nape": "nape"}
POSITIONS = tuple(_POSITIONS)


class ItemClassifier(LlamaPreTrainedModel):
    """A model for sets of items, which have no tokens: a network embeds them, and a decoder classifies the last one."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Sequential(
            nn.Linear(config.item_features, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.model = LlamaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, items: torch.Tensor, scored_at: torch.Tensor) -> torch.Tensor:
        """(batch, items, features) -> (batch, targets, classes)."""
        hidden_states = self.model(inputs_embeds=self.encoder(items), use_cache=False).last_hidden_state
        return self.classifier(hidden_states[:, scored_at])


def build_model(task: Task, method: str, positions: str, flags: dict[str, Any] | None = None) -> PreTrainedModel:
    """A new model of the task's size, with weights drawn from torch's global seed.

    Args:
        task: gives sizes and vocabulary.
        method: one of METHODS.
        positions: one of POSITIONS. Stick-breaking depends on the order of the keys by itself: rope or nope only.
        flags: further fields of ASEntmaxConfig (`top_k`, `delta`, `gamma_range`, `alibi_slopes`, ...). They override
            those of the method.

    Raises:
        ValueError: the method or the positions are unknown, or do not go together.
    """
    if method not in METHODS or positions not in POSITIONS:
        raise ValueError(f"expected one of {METHODS} and of {POSITIONS}, got {method!r} and {positions!r}")
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=task.hidden,
        intermediate_size=task.ffn,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        num_key_value_heads=task.heads,
        head_dim=task.head_dim,
        hidden_act="gelu_pytorch_tanh",  # the paper's models are Gemma-2's
        max_position_embeddings=131_072,
        bos_token_id=task.bos,
        eos_token_id=task.eos,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    if isinstance(task, MaxRetrieval):
        config.item_features = task.features
    make = ItemClassifier._from_config if isinstance(task, MaxRetrieval) else AutoModelForCausalLM.from_config
    if method == stick_breaking.NAME:
        if positions not in ("rope", "nope") or flags:
            raise ValueError(
                f"stick-breaking has no flags, and its positions must be rope or nope; got {positions} and {flags}"
            )
        config.stick_breaking_positions = positions
        return _prepared(make(config, attn_implementation=stick_breaking.NAME))
    config.asentmax = hf_asentmax.ASEntmaxConfig(
        **{**_FLAGS[method], "positions": _POSITIONS[positions], **(flags or {})}
    )
    return make(config, attn_implementation="asentmax")


def alibi_heads(positions: str, heads: int) -> int:
    """How many of a layer's heads, from the first, have ALiBi under one of POSITIONS."""
    return {"nape": heads // 2, "alibi": heads}.get(positions, 0)


def load_model(folder: Path) -> PreTrainedModel:
    """A model that `save_pretrained` wrote, in eval mode."""
    config = AutoConfig.from_pretrained(folder)
    model_class = ItemClassifier if hasattr(config, "item_features") else AutoModelForCausalLM
    if hasattr(config, "stick_breaking_positions"):
        return _prepared(model_class.from_pretrained(folder, attn_implementation=stick_breaking.NAME)).eval()
    return model_class.from_pretrained(folder).eval()


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """The stick-breaking model, without its rotary positions where `nope` was asked for."""
    if model.config.stick_breaking_positions == "nope":
        model.model.rotary_emb = stick_breaking.NoRotation(model.config.head_dim)
    return model


def outputs_at(model: nn.Module, batch: Batch, mask: torch.Tensor | None = None) -> torch.Tensor:
    """(batch, targets, vocabulary): the model's outputs where the batch is scored.

    Args:
        model: from `build_model`, compiled or not.
        batch: on the model's device.
        mask: (1, heads, length, length) bool, what each head's tokens see; None for causal attention to all tokens.

    Raises:
        ValueError: there is a mask, and the task has items, whose model takes none.
    """
    if batch.inputs.is_floating_point():
        if mask is not None:
            raise ValueError("a model of items (max_retrieval) takes no mask: leave out alibi-window")
        return model(batch.inputs, batch.scored_at)
    if mask is None:
        # Without a mask, transformers when compiled looks for packed sequences and builds a square mask.
        mask = torch.ones_like(batch.inputs, dtype=torch.bool)
    else:
        mask = mask.expand(len(batch.inputs), -1, -1, -1)
    return model(input_ids=batch.inputs, attention_mask=mask, logits_to_keep=batch.scored_at, use_cache=False).logits
