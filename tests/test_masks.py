"""The mask tensors against the definition, key by key."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from hf_asentmax.masks import Masks, alibi_positions, query_positions, visible_count, visible_keys

from reference import reference_visible


@given(
    st.integers(1, 9),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([None, 1, 3, 30]),
    st.sampled_from(["none", "padding", "4D"]),
    st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_visible_keys_and_their_count(
    q_len: int, more: int, causal: bool, window: int | None, kind: str, seed: int
) -> None:
    kv_len = q_len + more
    generator = torch.Generator().manual_seed(seed)
    shape = {"none": None, "padding": (2, kv_len), "4D": (2, 3, q_len, kv_len)}[kind]
    mask = None if shape is None else torch.rand(shape, generator=generator) > 0.4
    expected = reference_visible(2, 3, q_len, kv_len, is_causal=causal, attention_mask=mask, sliding_window=window)
    masks = Masks(causal, mask, window)
    position = query_positions(q_len, kv_len, "cpu")
    visible = visible_keys(position, kv_len, masks)
    visible = torch.ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else visible
    assert torch.equal(visible.expand(2, 3, q_len, kv_len), expected)
    count = visible_count(position, kv_len, masks)
    assert torch.equal(count.expand(2, 3, q_len), expected.sum(-1))


def test_packed() -> None:
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    visible = visible_keys(query_positions(5, 5, "cpu"), 5, Masks(cu_seqlens=cu_seqlens))
    assert visible is not None
    assert torch.equal(visible, reference_visible(1, 1, 5, 5, cu_seqlens=cu_seqlens))


def test_alibi_positions_stay_at_the_last_visible_key() -> None:
    visible = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])[None, None]
    assert alibi_positions(query_positions(3, 4, "cpu"), visible).tolist() == [[[1, 2, 3]]]
