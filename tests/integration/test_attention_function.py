"""The attention function that transformers calls: unprepared modules, arguments of other families, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

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


@pytest.mark.parametrize("value", [1, False, "text", torch.zeros(2, 3), object()])
def test_unknown_arguments_are_refused(value: Any) -> None:
    message = r"LlamaAttention passes something_new=.* to its attention function.*leave it out.*another family"
    with pytest.raises(NotImplementedError, match=message):
        call(attention_module(), something_new=value)


def test_known_arguments_change_no_score() -> None:
    module = attention_module()
    arguments = {"asentmax_hidden_states": torch.randn(1, 5, 32)}
    torch.manual_seed(0)
    expected = call(module, **arguments)
    harmless = {"position_ids": torch.arange(5)[None], "use_cache": True, "num_items_in_batch": 3, "something": None}
    torch.manual_seed(0)
    assert torch.equal(call(module, **arguments, **harmless), expected)


def test_keys_that_an_indexer_selects_are_refused() -> None:
    """DeepSeek V3.2 selects keys and passes their indices to the attention function."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    config = AutoConfig.for_model(
        "deepseek_v32",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=2,
        **latent,
        **experts,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")
    with pytest.raises(NotImplementedError, match=r"keys selected by an indexer \(indices\)"):
        model(torch.arange(6)[None])


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    module, value = attention_module(scaling="none"), torch.ones(1, 2, 5, 8)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    outputs = [asentmax_attention_forward(module, query, key, value, None, dropout=0.5)[0] for _ in range(400)]
    assert torch.unique(torch.stack(outputs)).numel() > 2
    assert torch.allclose(torch.stack(outputs).mean(0), torch.ones(1, 5, 4, 8), atol=0.25)
