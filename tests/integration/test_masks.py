"""A row has the same output alone, left-padded, right-padded, packed and with a 4D mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    PreTrainedModel,
    masking_utils,
)
from transformers.masking_utils import sdpa_mask

from hf_asentmax.attention import attend
from hf_asentmax.call import Call
from hf_asentmax.integration.masks import asentmax_mask, first_keys

from tiny_models import perturbed_model, random_ids, tiny_model

FLAGS = {"positions": "nape"}
FIRST, SECOND = random_ids(1, 7, seed=1), random_ids(1, 13, seed=2)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    model = perturbed_model(family, "asentmax", FLAGS)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(ids, **kwargs).logits


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """A batch of both rows, its mask, and the slice of the first row's tokens."""
    filler = torch.full((1, 6), 63)
    first = [filler, FIRST] if side == "left" else [FIRST, filler]
    ids = torch.cat([torch.cat(first, 1), SECOND])
    mask = torch.ones_like(ids)
    place = slice(6, None) if side == "left" else slice(None, 7)
    mask[0] = 0
    mask[0, place] = 1
    return ids, mask, place


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: PreTrainedModel, side: str) -> None:
    ids, mask, place = padded(side)
    out = logits(model, ids, attention_mask=mask)
    assert torch.allclose(out[:1, place], logits(model, FIRST), atol=2e-6)
    assert torch.allclose(out[1:], logits(model, SECOND), atol=2e-6)


def test_a_mask_of_ones_changes_nothing(model: PreTrainedModel) -> None:
    assert torch.allclose(
        logits(model, SECOND, attention_mask=torch.ones_like(SECOND)), logits(model, SECOND), atol=2e-6
    )


@pytest.mark.parametrize("training", [False, True])
def test_packed_by_positions(model: PreTrainedModel, training: bool) -> None:
    """Also with the default use_cache=True, for which transformers would let documents see each other."""
    ids = torch.cat([FIRST, SECOND], 1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    out = logits(model.train(training), ids, position_ids=positions)
    alone = torch.cat([logits(model, FIRST), logits(model, SECOND)], 1)
    assert torch.allclose(out, alone, atol=2e-6)


@pytest.mark.parametrize("flash_kwargs", [False, True])
def test_packed_by_the_collator(model: PreTrainedModel, flash_kwargs: bool) -> None:
    features = [{"input_ids": ids[0].tolist()} for ids in (FIRST, SECOND)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs, return_tensors="pt")(features)
    batch.pop("labels")
    if flash_kwargs:
        assert "cu_seq_lens_q" in batch
        batch.pop("position_ids", None)
    alone = torch.cat([logits(model, FIRST), logits(model, SECOND)], 1)
    assert torch.allclose(logits(model, batch.pop("input_ids"), **batch), alone, atol=2e-6)


def test_packed_with_inputs_embeds(model: PreTrainedModel) -> None:
    ids = torch.cat([FIRST, SECOND], 1)
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        out = model(inputs_embeds=embeds, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens).logits
    assert torch.allclose(out, logits(model, ids, cu_seq_lens_q=cu_seqlens), atol=2e-6)


def test_packed_sequences_and_a_cache_or_a_mask_do_not_go_together() -> None:
    model = tiny_model("llama", "asentmax", FLAGS)
    ids = torch.cat([FIRST, SECOND], 1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    with pytest.raises(ValueError, match="cannot be cached"):
        model(ids, position_ids=positions, use_cache=True)
    with pytest.raises(ValueError, match="without padding or cache"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 7, 20]), attention_mask=torch.ones_like(ids))


def test_a_family_that_can_not_pack_says_so() -> None:
    config = AutoConfig.for_model(
        "opt",
        vocab_size=64,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="asentmax").eval()
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(torch.cat([FIRST, SECOND], 1), position_ids=torch.cat([torch.arange(7), torch.arange(13)])[None])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_packed_sequences_make_no_square_mask(
    family: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without padding, cache and torch.compile, first keys describe the mask completely."""
    model = perturbed_model(family, "asentmax", {})
    ids = torch.cat([FIRST, SECOND], 1).repeat(2, 1)
    positions = torch.cat([torch.arange(7), torch.arange(13)]) if packed else torch.arange(20)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("hf_asentmax.integration.masks.first_keys", lambda *_: None)  # the square mask
        expected = model(ids, position_ids=positions[None].repeat(2, 1), use_cache=False).logits
    starts: list[torch.Tensor | None] = []

    def seen(call: Call) -> Any:
        starts.append(call.masks.key_start)
        return attend(call)

    def none_alone(**kwargs: Any) -> None:
        assert sdpa_mask(**kwargs) is None, "a square mask"

    monkeypatch.setattr("hf_asentmax.integration.forward.attend", seen)
    monkeypatch.setattr("hf_asentmax.integration.masks.sdpa_mask", none_alone)
    with torch.no_grad():
        out = model(ids, position_ids=positions[None].repeat(2, 1), use_cache=False).logits
    assert torch.allclose(out, expected, atol=2e-6)
    windows = getattr(model.config, "sliding_window", None) is not None
    assert any(start is not None for start in starts) == (packed or windows)


@pytest.mark.parametrize("padding", [None, "left", "longer", "shorter"])
@pytest.mark.parametrize("offset", [0, 4, torch.tensor(4), torch.tensor([7])])
def test_the_mask_of_a_static_cache_s_step_is_transformers_own(
    padding: str | None, offset: int | torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is equal and takes fewer launches."""
    length = {"left": 8, "longer": 11, "shorter": 5}.get(padding or "")
    mask = None if length is None else torch.arange(length)[None] >= torch.tensor([[0], [3]])
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": 1,
        "kv_length": 8,
        "q_offset": offset,
        "attention_mask": mask,
        "allow_is_causal_skip": False,
        "device": torch.device("cpu"),
    }
    expected = sdpa_mask(**arguments)
    monkeypatch.delattr("hf_asentmax.integration.masks.sdpa_mask")
    assert torch.equal(asentmax_mask(**arguments), expected)  # type: ignore[arg-type]


def test_masks_of_other_kinds_stay_square() -> None:
    """First keys describe only causality, windows and packed sequences."""
    window = masking_utils.sliding_window_causal_mask_function(3)
    assert first_keys(window, 6, "cpu").tolist() == [[0, 0, 0, 1, 2, 3]]  # type: ignore[union-attr]
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]]))
    both = masking_utils.and_masks(packed, window)
    assert first_keys(both, 6, "cpu").tolist() == [[0, 0, 2, 2, 2, 5], [0, 0, 0, 1, 2, 3]]  # type: ignore[union-attr]
    unordered = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 1, 0, 1]]))
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)  # from transformers 5.2x on
    remapped = [] if remap is None else [remap(window, torch.tensor([[0, 1, 0, 1]]))]
    for other in (
        masking_utils.or_masks(window, packed),
        masking_utils.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
        masking_utils.sliding_window_overlay(3),  # no causality
        masking_utils.and_masks(unordered, masking_utils.causal_mask_function),
        lambda batch, head, query, key: key <= query,
        partial(window),
        *remapped,  # the sequences are not separated
        masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(torch.zeros(1, 9)), window
        ),  # another length
        masking_utils.sliding_window_causal_mask_function(None),
    ):
        assert first_keys(other, 4, "cpu") is None


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_4d_masks(kind: str) -> None:
    model = perturbed_model("llama", "asentmax", FLAGS)
    ids, mask, place = padded("left")
    visible = torch.ones(13, 13).tril().bool()[None, None] & mask.bool()[:, None, None]
    if kind == "float":
        visible = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    out = logits(model, ids, attention_mask=visible)
    assert torch.allclose(out[:1, place], logits(model, FIRST), atol=2e-6)


@pytest.mark.parametrize("preset", ["asentmax", "ssmax", "entmax"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (2, 1, 1, 9), (1, 1, 1, 9)])
def test_4d_masks_broadcast(shape: tuple[int, ...], kind: str, preset: str) -> None:
    """With one row for the batch or for all queries, as with every attention of transformers."""
    model = perturbed_model("llama", preset)
    ids = random_ids(2, 9)
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    if kind == "float":
        visible = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    full = visible.expand(2, 1, 9, 9).contiguous()
    assert torch.allclose(
        logits(model, ids, attention_mask=visible), logits(model, ids, attention_mask=full), atol=1e-6
    )


def test_a_4d_mask_with_a_bias_is_refused() -> None:
    model = tiny_model("llama", "asentmax")
    with pytest.raises(NotImplementedError, match="adds values other than 0 and minus infinity"):
        model(FIRST, attention_mask=torch.full((1, 1, 7, 7), -0.5))


def test_a_compiled_model_refuses_a_4d_mask_with_a_bias_too() -> None:
    model = tiny_model("llama", "asentmax", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hidden = torch.finfo(torch.float32).min
    mask = torch.where(torch.ones(7, 7).tril().bool(), 0.0, hidden)[None, None]
    with torch.no_grad():
        shown = compiled(FIRST, attention_mask=mask, use_cache=False).logits
        assert torch.allclose(shown, logits(model, FIRST), atol=2e-6)
        with pytest.raises(RuntimeError, match="adds values other than 0 and minus infinity"):
            compiled(FIRST, attention_mask=torch.full((1, 1, 7, 7), -0.5), use_cache=False)


def test_the_length_scaling_counts_visible_keys_and_not_positions() -> None:
    """The output depends on the number of visible keys, and a padded row must not count its padding."""
    model = perturbed_model("llama", "asentmax", {"positions": "nope"}, num_hidden_layers=1)
    ids, mask, place = padded("left")
    expected = logits(model, FIRST)
    assert torch.allclose(logits(model, ids, attention_mask=mask)[:1, place], expected, atol=2e-6)
    scaling = model.model.layers[0].self_attn.length_scaling
    hidden = torch.randn(1, 2, 32)
    few, many = (scaling(hidden, torch.full((1, 1, 2), n)) for n in (7, 13))
    assert not torch.allclose(few, many), "the test would not notice a wrong count"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_leak_into_gradients(side: str) -> None:
    model = perturbed_model("llama", "asentmax", FLAGS)
    ids, mask, place = padded(side)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        loss = out.log_softmax(-1)[0, :, 5].sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    alone = gradients(model(FIRST).logits)
    in_batch = gradients(model(ids, attention_mask=mask).logits[:1, place])
    for a, b in zip(alone, in_batch, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "call"),
    [("llama", "ids"), ("gpt2", "positional"), pytest.param("gpt_neox", "embeds", marks=pytest.mark.slow)],
)
def test_a_compiled_model_without_positions_makes_no_square_mask(
    family: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While traced, transformers cannot see that nothing is packed, and would make a mask over all pairs of tokens."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a square mask")

    torch._dynamo.reset()
    model = perturbed_model(family, "asentmax", FLAGS, num_hidden_layers=1)
    embeds = model.get_input_embeddings()(FIRST).detach()
    args, kwargs = {
        "ids": ((), {"input_ids": FIRST}),
        "positional": ((FIRST,), {}),
        "embeds": ((), {"inputs_embeds": embeds}),
    }[call]
    with torch.no_grad():
        expected = model(*args, **kwargs, use_cache=False).logits
        monkeypatch.setattr("hf_asentmax.integration.masks.sdpa_mask", refused)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(*args, **kwargs, use_cache=False).logits, expected, atol=2e-6)
