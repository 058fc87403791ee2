"""Wrong arguments of entmax_attention: each error says what was expected and what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hf_asentmax import entmax_attention

BATCH, HEADS, KV_HEADS, Q_LEN, KV_LEN, DIM = 2, 4, 2, 3, 5, 8


def tensors(**replaced: Any) -> dict[str, Any]:
    """Valid query, key and value, with some arguments replaced or added."""
    right = {
        "query": torch.randn(BATCH, HEADS, Q_LEN, DIM),
        "key": torch.randn(BATCH, KV_HEADS, KV_LEN, DIM),
        "value": torch.randn(BATCH, KV_HEADS, KV_LEN, DIM),
    }
    return {**right, **replaced}


def assert_refused(error: type[Exception], *parts: str, **arguments: Any) -> None:
    """Check that the call raises `error` with a message that contains every part."""
    with pytest.raises(error) as caught:
        entmax_attention(**tensors(**arguments))
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def test_the_right_arguments_are_right():
    assert entmax_attention(**tensors()).shape == (BATCH, HEADS, Q_LEN, DIM)


# --- alpha


@pytest.mark.parametrize("alpha", [0.5, 0.999, 0, -1, 2.001, 3, float("nan"), float("inf"), "1.5", None, True, [1.5]])
def test_alpha(alpha: Any):
    with pytest.raises((ValueError, TypeError)) as caught:
        entmax_attention(**tensors(alpha=alpha))
    assert "alpha must be a number from 1 (softmax) to 2 (sparsemax)" in str(caught.value)
    assert repr(alpha) in str(caught.value)


def test_a_tensor_as_alpha():
    assert_refused(ValueError, "alpha must be a number from 1", alpha=torch.tensor(1.5))


@pytest.mark.parametrize("alpha", [1, 1.0, 1.001, 1.5, 2, 2.0])
def test_alpha_that_is_right(alpha: float):
    assert torch.isfinite(entmax_attention(**tensors(alpha=alpha))).all()


# --- types of query, key and value


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_inputs_that_are_not_floating_point(name: str, dtype: torch.dtype):
    wrong = torch.ones(BATCH, HEADS if name == "query" else KV_HEADS, Q_LEN if name == "query" else KV_LEN, DIM)
    assert_refused(TypeError, name, "floating point", str(dtype), **{name: wrong.to(dtype)})


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("wrong", [None, 1.0, [[1.0]]])
def test_inputs_that_are_no_tensors(name: str, wrong: Any):
    assert_refused(TypeError, name, "tensor", type(wrong).__name__, **{name: wrong})


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_different_types(name: str, dtype: torch.dtype):
    wrong = torch.ones(BATCH, KV_HEADS, KV_LEN, DIM, dtype=dtype)
    assert_refused(ValueError, "must have the same type and device", "torch.float32", str(dtype), **{name: wrong})


def test_inputs_on_different_devices():
    wrong = torch.ones(BATCH, KV_HEADS, KV_LEN, DIM, device="meta")
    assert_refused(ValueError, "must have the same type and device", "cpu", "meta", key=wrong)


# --- shapes


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 8), (2, 5, 8), (1, 2, 2, 5, 8)])
def test_wrong_number_of_dimensions(name: str, shape: tuple[int, ...]):
    assert_refused(
        ValueError,
        f"{name} must be (batch, heads, length, head_dim), got {len(shape)} dimensions: {shape}",
        **{name: torch.ones(shape)},
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("key", (3, KV_HEADS, KV_LEN, DIM)),
        ("value", (3, KV_HEADS, KV_LEN, DIM)),
        ("key", (BATCH, KV_HEADS, KV_LEN, DIM + 1)),
        ("key", (BATCH, KV_HEADS, KV_LEN + 1, DIM)),
        ("value", (BATCH, KV_HEADS, KV_LEN + 1, DIM)),
        ("value", (BATCH, KV_HEADS * 2, KV_LEN, DIM)),
        ("key", (1, KV_HEADS, KV_LEN, DIM)),
        ("query", (BATCH, HEADS, Q_LEN, DIM * 2)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]):
    assert_refused(
        ValueError,
        "expected query (batch, heads, q_len, head_dim), key (batch, kv_heads, kv_len, head_dim) and value "
        "(batch, kv_heads, kv_len, value_dim)",
        str(shape),
        **{name: torch.ones(shape)},
    )


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (3, 2), (2, 4), (1, 2), (4, 0)])
def test_heads_that_are_no_multiple_of_kv_heads(heads: int, kv_heads: int):
    keys = torch.ones(BATCH, kv_heads, KV_LEN, DIM)
    assert_refused(
        ValueError,
        f"query's heads must be a multiple of key's heads, got {heads} and {kv_heads}",
        query=torch.ones(BATCH, heads, Q_LEN, DIM),
        key=keys,
        value=keys,
    )


def test_no_keys():
    keys = torch.ones(BATCH, KV_HEADS, 0, DIM)
    assert_refused(ValueError, "key has length 0", key=keys, value=keys, is_causal=False)


def test_no_queries_and_no_rows_are_empty_not_wrong():
    assert entmax_attention(**tensors(query=torch.ones(BATCH, HEADS, 0, DIM))).shape == (BATCH, HEADS, 0, DIM)
    empty = torch.ones(0, KV_HEADS, KV_LEN, DIM)
    output = entmax_attention(torch.ones(0, HEADS, Q_LEN, DIM), empty, empty)
    assert output.shape == (0, HEADS, Q_LEN, DIM)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2, "is_causal": False}])
def test_more_causal_queries_than_keys(options: dict[str, Any]):
    query = torch.ones(BATCH, HEADS, KV_LEN + 1, DIM)
    assert_refused(ValueError, f"length {KV_LEN + 1}", f"at least as many keys, got {KV_LEN}", query=query, **options)


def test_more_queries_than_keys_without_causality_are_right():
    query = torch.ones(BATCH, HEADS, KV_LEN + 3, DIM)
    assert entmax_attention(**tensors(query=query, is_causal=False)).shape == query.shape


def test_another_value_dim_is_right():
    assert entmax_attention(**tensors(value=torch.ones(BATCH, KV_HEADS, KV_LEN, 3))).shape == (BATCH, HEADS, Q_LEN, 3)


# --- scale, is_causal


@pytest.mark.parametrize("scale", ["1", None, float("nan"), float("inf"), [1.0], True])
def test_scale(scale: Any):
    if scale is None:  # the default
        entmax_attention(**tensors(scale=None))
        return
    with pytest.raises((TypeError, ValueError), match=r"scale must be a finite number.*got"):
        entmax_attention(**tensors(scale=scale))


@pytest.mark.parametrize("is_causal", ["no", None, 1, torch.tensor(True)])
def test_is_causal(is_causal: Any):
    assert_refused(TypeError, "is_causal must be True or False", is_causal=is_causal)


# --- attention_mask


MASK = (
    f"attention_mask must be a padding mask ({BATCH}, {KV_LEN}), bool or integer, or a bool mask "
    f"({BATCH} or 1, {HEADS} or 1, {Q_LEN} or 1, {KV_LEN})"
)


@pytest.mark.parametrize(
    "shape",
    [
        (KV_LEN,),
        (BATCH, KV_LEN - 1),
        (BATCH, Q_LEN),
        (1, KV_LEN),
        (BATCH, Q_LEN, KV_LEN),
        (BATCH, KV_HEADS, Q_LEN, KV_LEN),
        (BATCH, 1, KV_LEN, Q_LEN),
        (BATCH, 1, 1, 1),
        (BATCH + 1, 1, Q_LEN, KV_LEN),
        (BATCH, 1, Q_LEN + 1, KV_LEN),
        (BATCH, 1, Q_LEN, KV_LEN + 1),
        (BATCH, 1, 1, Q_LEN, KV_LEN),
    ],
)
def test_mask_of_a_wrong_shape(shape: tuple[int, ...]):
    assert_refused(ValueError, MASK, f"got {shape}", attention_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_4d_mask_of_a_wrong_type(dtype: torch.dtype):
    mask = torch.zeros(BATCH, 1, Q_LEN, KV_LEN, dtype=dtype)
    assert_refused(TypeError, MASK, f"got {dtype}", attention_mask=mask)


def test_additive_mask_says_how_to_turn_it():
    mask = torch.zeros(BATCH, 1, Q_LEN, KV_LEN)
    assert_refused(TypeError, "mask == 0", attention_mask=mask)
    assert_refused(TypeError, MASK, attention_mask=torch.zeros(BATCH, KV_LEN))


@pytest.mark.parametrize("mask", [[[1] * KV_LEN] * BATCH, "causal", True, 1])
def test_mask_that_is_no_tensor(mask: Any):
    assert_refused(TypeError, MASK, f"got {type(mask).__name__}", attention_mask=mask)


def test_mask_on_another_device():
    mask = torch.ones(BATCH, KV_LEN, dtype=torch.bool, device="meta")
    assert_refused(ValueError, "attention_mask must be on query's device cpu, got meta", attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_padding_masks_that_are_right(dtype: torch.dtype):
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    arguments = tensors(attention_mask=mask.to(dtype))
    expected = entmax_attention(**{**arguments, "attention_mask": mask.bool()})
    assert torch.equal(entmax_attention(**arguments), expected)


# --- alibi_slopes


@pytest.mark.parametrize(
    ("slopes", "error", "parts"),
    [
        ([1.0] * HEADS, TypeError, ("alibi_slopes must be a floating point tensor of shape (heads,)", "list")),
        (1.0, TypeError, ("alibi_slopes must be a floating point tensor", "float")),
        (torch.ones(HEADS, dtype=torch.int64), TypeError, ("alibi_slopes must be a floating point", "torch.int64")),
        (torch.ones(HEADS + 1), ValueError, ("one slope per head, (4,), got (5,)",)),
        (torch.ones(KV_HEADS), ValueError, ("one slope per head, (4,), got (2,)",)),
        (torch.ones(HEADS, 1), ValueError, ("one slope per head, (4,), got (4, 1)",)),
        (torch.ones(()), ValueError, ("one slope per head, (4,), got ()",)),
        (torch.ones(HEADS, device="meta"), ValueError, ("alibi_slopes must be on query's device cpu, got meta",)),
        (torch.tensor([1.0, -1.0, 0.0, 0.0]), ValueError, ("alibi_slopes must be finite and at least 0", "-1.0")),
        (torch.tensor([1.0, float("nan"), 0, 0]), ValueError, ("alibi_slopes must be finite and at least 0", "nan")),
    ],
)
def test_alibi_slopes(slopes: Any, error: type[Exception], parts: tuple[str, ...]):
    assert_refused(error, *parts, alibi_slopes=slopes)


def test_alibi_slopes_in_float64_for_float32_inputs_are_right():
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    arguments = tensors(alibi_slopes=slopes)
    assert torch.equal(entmax_attention(**arguments), entmax_attention(**{**arguments, "alibi_slopes": slopes.float()}))


# --- cu_seqlens


def packed(**options: Any) -> dict[str, Any]:
    shape = (1, KV_HEADS, KV_LEN, DIM)
    return {
        "query": torch.randn(1, HEADS, KV_LEN, DIM),
        "key": torch.randn(shape),
        "value": torch.randn(shape),
        **options,
    }


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "parts"),
    [
        ([0, 2, 5], TypeError, ("cu_seqlens must be an int32 or int64 tensor", "list")),
        (torch.tensor([0.0, 5.0]), TypeError, ("cu_seqlens must be an int32 or int64 tensor", "torch.float32")),
        (torch.tensor([False, True]), TypeError, ("cu_seqlens must be an int32 or int64 tensor", "torch.bool")),
        (torch.tensor([5]), ValueError, ("at least 2 boundaries, got (1,)",)),
        (torch.tensor([[0, 5]]), ValueError, ("(sequences + 1,)", "got (1, 2)")),
        (torch.tensor([1, 5]), ValueError, ("must increase from 0 to kv_len = 5, got [1, 5]",)),
        (torch.tensor([0, 4]), ValueError, ("must increase from 0 to kv_len = 5, got [0, 4]",)),
        (torch.tensor([0, 6]), ValueError, ("must increase from 0 to kv_len = 5, got [0, 6]",)),
        (torch.tensor([0, 3, 2, 5]), ValueError, ("must increase from 0 to kv_len = 5, got [0, 3, 2, 5]",)),
        (torch.tensor([0, -1, 5]), ValueError, ("must increase from 0 to kv_len = 5, got [0, -1, 5]",)),
        (torch.tensor([0, 5], device="meta"), ValueError, ("cu_seqlens must be on query's device cpu, got meta",)),
    ],
)
def test_cu_seqlens(cu_seqlens: Any, error: type[Exception], parts: tuple[str, ...]):
    assert_refused(error, *parts, **packed(cu_seqlens=cu_seqlens))


def test_cu_seqlens_with_a_batch_or_a_cache():
    boundaries = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert_refused(ValueError, "batch 1", "batch 2", cu_seqlens=boundaries, query=torch.ones(BATCH, HEADS, KV_LEN, DIM))
    cached = packed(cu_seqlens=boundaries, query=torch.ones(1, HEADS, 2, DIM))
    assert_refused(ValueError, "as many queries as keys", "q_len 2, kv_len 5", **cached)


@pytest.mark.parametrize("boundaries", [[0, 5], [0, 2, 5], [0, 2, 2, 5]])
def test_cu_seqlens_that_are_right(boundaries: list[int]):
    for dtype in (torch.int32, torch.int64):
        assert torch.isfinite(entmax_attention(**packed(cu_seqlens=torch.tensor(boundaries, dtype=dtype)))).all()


# --- key_start


@pytest.mark.parametrize(
    ("key_start", "error", "parts"),
    [
        ([[0] * KV_LEN], TypeError, ("key_start must be an int32 tensor", "list")),
        (torch.zeros(1, KV_LEN, dtype=torch.int64), TypeError, ("key_start must be an int32 tensor", "torch.int64")),
        (torch.zeros(KV_LEN, dtype=torch.int32), ValueError, ("(batch or 1, q_len)", f"got ({KV_LEN},)")),
        (torch.zeros(3, KV_LEN, dtype=torch.int32), ValueError, ("(batch or 1, q_len)", f"got (3, {KV_LEN})")),
        (torch.zeros(1, 2, dtype=torch.int32), ValueError, ("(batch or 1, q_len)", "got (1, 2)")),
        (
            torch.zeros(1, KV_LEN, dtype=torch.int32, device="meta"),
            ValueError,
            ("key_start must be on query's device cpu, got meta",),
        ),
    ],
)
def test_key_start(key_start: Any, error: type[Exception], parts: tuple[str, ...]):
    assert_refused(error, *parts, **packed(key_start=key_start))


def test_a_key_start_out_of_range_hides_nothing_or_all():
    call = packed()
    before, beyond = (torch.full((1, KV_LEN), start, dtype=torch.int32) for start in (-3, KV_LEN + 3))
    assert torch.equal(entmax_attention(**call, key_start=before), entmax_attention(**call))
    assert not entmax_attention(**call, key_start=beyond).any()


# --- sliding_window, softcap, backend


@pytest.mark.parametrize("window", [0, -1, True, 2.5, "3", float("nan"), (1, 2)])
def test_sliding_window(window: Any):
    with pytest.raises((TypeError, ValueError)) as caught:
        entmax_attention(**tensors(sliding_window=window))
    assert str(caught.value) == f"sliding_window must be a whole number of at least 1, got {window!r}"


@pytest.mark.parametrize("softcap", [0, 0.0, -1.0, float("nan"), float("inf"), "50", True, [1.0]])
def test_softcap(softcap: Any):
    with pytest.raises((TypeError, ValueError)) as caught:
        entmax_attention(**tensors(softcap=softcap))
    assert str(caught.value) == f"softcap must be a finite number above 0, got {softcap!r}"


@pytest.mark.parametrize("backend", ["cuda", "Eager", "", None, 1, ["eager"]])
def test_backend(backend: Any):
    assert_refused(ValueError, f"backend must be one of auto, eager, torch, triton; got {backend!r}", backend=backend)


def test_triton_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels' tests set it on a CPU
    assert_refused(NotImplementedError, "backend='triton' cannot run this call", "backend='eager'", backend="triton")


def test_options_are_keywords_only():
    given = tensors()
    with pytest.raises(TypeError, match="positional"):
        entmax_attention(given["query"], given["key"], given["value"], 1.5)  # type: ignore[misc]


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match=re.escape("unexpected keyword argument 'causal'")):
        entmax_attention(**tensors(), causal=True)


# --- key_norm_bound


@pytest.mark.parametrize(
    ("bound", "error", "parts"),
    [
        (torch.ones(BATCH, KV_HEADS, dtype=torch.int64), TypeError, ("floating point tensor", "torch.int64")),
        ([1.0, 1.0], TypeError, ("floating point tensor", "list")),
        (torch.ones(KV_HEADS), ValueError, ("(2 or 1, 2), got (2,)",)),
        (torch.ones(BATCH, HEADS), ValueError, ("(2 or 1, 2), got (2, 4)",)),
        (torch.ones(1, KV_HEADS, device="meta"), ValueError, ("must be on key's device cpu, got meta",)),
    ],
)
def test_key_norm_bound(bound: Any, error: type[Exception], parts: tuple[str, ...]):
    assert_refused(error, "key_norm_bound", *parts, key_norm_bound=bound)
