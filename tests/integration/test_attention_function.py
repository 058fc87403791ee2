"""The attention function that transformers calls: unprepared modules, arguments of other families, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_asentmax.integration.forward import asentmax_attention_forward

from tiny_models import perturbed_model, tiny_model


def attention_module(**flags: Any) -> nn.Module:
    """The attention of a Llama with 4 heads of size 8 and 2 key heads, in eval mode."""
    return perturbed_model("llama", "asentmax", flags or None, num_hidden_layers=1).model.layers[0].self_attn


def call(module: nn.Module, heads: int = 4, **arguments: Any) -> torch.Tensor:
    """The output of the attention function on random tensors of 5 positions."""
    query, key, value = (torch.randn(1, count, 5, 8) for count in (heads, 2, 2))
    arguments = {"asentmax_hidden_states": torch.randn(1, 5, 32), **arguments}
    with torch.no_grad():
        return asentmax_attention_forward(module, query, key, value, None, **arguments)[0]


def test_a_module_of_another_implementation_is_refused() -> None:
    module = tiny_model("llama", "sdpa", num_hidden_layers=1).model.layers[0].self_attn
    with pytest.raises(RuntimeError, match=r'LlamaAttention was built without .* attn_implementation="asentmax"'):
        call(module)


def test_without_the_layers_input_there_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the layer's input did not reach the attention function of LlamaAttention"):
        call(attention_module(), asentmax_hidden_states=None)


def test_another_number_of_heads_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="has 2 query heads, but its config says 4"):
        call(attention_module(), heads=2)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "head_mask", "block_table"])
def test_arguments_that_change_the_attention_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"LlamaAttention asks for .* \({name}\)"):
        call(attention_module(), **{name: torch.zeros(1)})


def test_unknown_arguments_are_ignored_with_one_warning(transformers_log: list[str]) -> None:
    module = attention_module()
    for _ in range(2):
        call(module, something_new=1, position_ids=None)
    assert sum("passes 'something_new' to its attention" in message for message in transformers_log) == 1


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    module, value = attention_module(scaling="none"), torch.ones(1, 2, 5, 8)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    outputs = [asentmax_attention_forward(module, query, key, value, None, dropout=0.5)[0] for _ in range(400)]
    assert torch.unique(torch.stack(outputs)).numel() > 2
    assert torch.allclose(torch.stack(outputs).mean(0), torch.ones(1, 5, 4, 8), atol=0.25)
