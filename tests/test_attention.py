"""entmax_attention on the CPU against the float64 reference: outputs, gradients, every mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_asentmax import entmax_attention
from hf_asentmax.backends import eager as eager_module

from reference import assert_close, reference_attention, reference_visible

OUTPUT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def make(batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)
    shapes = ((batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 1.5 for shape in shapes]


def padding(batch: int, kv_len: int, kind: str) -> torch.Tensor:
    mask = torch.ones(batch, kv_len, dtype=torch.bool)
    for row in range(batch):
        count = (row * 3) % kv_len
        if count:
            if kind == "left":
                mask[row, :count] = False
            elif kind == "right":
                mask[row, -count:] = False
            else:
                mask[row, 1::3] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"is_causal": False},
    "window": {"sliding_window": 4},
    "window of one": {"sliding_window": 1},
    "window, not causal": {"sliding_window": 3, "is_causal": False},
    "left padding": {"attention_mask": "left"},
    "right padding": {"attention_mask": "right"},
    "holes": {"attention_mask": "holes"},
    "padding, window": {"attention_mask": "left", "sliding_window": 5},
    "4D": {"attention_mask": "4D"},
    "4D per head": {"attention_mask": "4D heads", "is_causal": False},
    "nothing visible": {"attention_mask": "none"},
    "alibi": {"alibi_slopes": True},
    "alibi, not causal": {"alibi_slopes": True, "is_causal": False},
    "alibi, left padding": {"alibi_slopes": True, "attention_mask": "left"},
    "softcap": {"softcap": 2.0, "alibi_slopes": True},
    "scale": {"scale": 0.7},
}


def options_for(case: str, batch: int, heads: int, q_len: int, kv_len: int) -> dict[str, Any]:
    options = dict(CASES[case])
    mask = options.get("attention_mask")
    generator = torch.Generator().manual_seed(3)
    if mask in ("left", "right", "holes"):
        options["attention_mask"] = padding(batch, kv_len, mask)
    elif mask == "none":
        options["attention_mask"] = torch.zeros(batch, kv_len, dtype=torch.bool)
    elif mask is not None:
        shape = (batch, heads if mask == "4D heads" else 1, q_len, kv_len)
        options["attention_mask"] = torch.rand(shape, generator=generator) > 0.4
    if options.get("alibi_slopes"):
        options["alibi_slopes"] = torch.linspace(0, 1, heads)
    return options


@pytest.mark.parametrize("shape", [(2, 4, 2, 7, 7, 16), (1, 3, 1, 1, 9, 8), (2, 2, 2, 5, 13, 10), (3, 2, 1, 1, 1, 4)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, shape: tuple[int, ...]) -> None:
    batch, heads, _, q_len, kv_len, dim = shape
    options = options_for(case, batch, heads, q_len, kv_len)
    visible = reference_visible(
        batch,
        heads,
        q_len,
        kv_len,
        **{k: v for k, v in options.items() if k in ("is_causal", "attention_mask", "sliding_window")},
    )
    scores = {k: v for k, v in options.items() if k in ("alibi_slopes", "softcap", "scale")}
    for alpha in (1.0, 1.3, 1.5, 2.0):
        tensors = [t.requires_grad_() for t in make(*shape, torch.float64)]
        grad_output = torch.randn(batch, heads, q_len, dim, dtype=torch.float64)
        output = entmax_attention(*tensors, alpha=alpha, **options)
        grads = torch.autograd.grad(output, tensors, grad_output)
        expected, expected_grads = reference_attention(
            *tensors, alpha=alpha, visible=visible, grad_output=grad_output, **scores
        )
        assert expected_grads is not None
        assert_close("output", output, expected, 1e-9)
        for name, grad, expected_grad in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True):
            assert_close(name, grad, expected_grad, 1e-7)
        sees_nothing = ~visible.any(-1)
        assert bool((output[sees_nothing] == 0).all())
        assert bool((grads[0][sees_nothing] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_precision(dtype: torch.dtype, alpha: float) -> None:
    tensors = [t.requires_grad_() for t in make(2, 4, 2, 33, 33, 32, dtype)]
    grad_output = torch.randn(2, 4, 33, 32).to(dtype)
    output = entmax_attention(*tensors, alpha=alpha)
    expected, grads = reference_attention(
        *tensors, alpha=alpha, visible=reference_visible(2, 4, 33, 33), grad_output=grad_output
    )
    assert grads is not None
    assert output.dtype == dtype
    assert_close("output", output, expected, OUTPUT_TOLERANCE[dtype])
    for name, actual, wanted in zip(
        ("dq", "dk", "dv"), torch.autograd.grad(output, tensors, grad_output), grads, strict=True
    ):
        assert_close(name, actual, wanted, 2 * OUTPUT_TOLERANCE[dtype])


def test_packed_sequences_equal_each_alone() -> None:
    query, key, value = make(1, 4, 2, 12, 12, 8, torch.float64)
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    cu_seqlens = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    packed = entmax_attention(query, key, value, cu_seqlens=cu_seqlens, alibi_slopes=slopes)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        part = [t[:, :, start:stop] for t in (query, key, value)]
        assert_close("part", packed[:, :, start:stop], entmax_attention(*part, alibi_slopes=slopes), 1e-12)


def test_each_row_of_a_cache_equals_the_full_forward() -> None:
    query, key, value = make(2, 4, 2, 9, 9, 8, torch.float64)
    slopes = torch.tensor([1.0, 0.5, 0.0, 0.0])
    full = entmax_attention(query, key, value, alibi_slopes=slopes, sliding_window=6)
    for i in range(9):
        step = entmax_attention(
            query[:, :, i : i + 1], key[:, :, : i + 1], value[:, :, : i + 1], alibi_slopes=slopes, sliding_window=6
        )
        assert_close(f"row {i}", step, full[:, :, i : i + 1], 1e-12)


def test_unfilled_slots_of_a_long_static_cache_do_not_cost_precision() -> None:
    """ALiBi's distances are measured from the last visible key, not from the end of the cache."""
    query, key, value = make(1, 2, 2, 1, 8, 8, torch.float32)
    slopes = torch.tensor([1 / 3, 1 / 7])
    slots = 1 << 20
    room = [torch.nn.functional.pad(t, (0, 0, 0, slots - 8)) for t in (key, value)]
    filled = (torch.arange(slots) < 8)[None]
    output = entmax_attention(query, *room, attention_mask=filled, alibi_slopes=slopes)
    assert_close("output", output, entmax_attention(query, key, value, alibi_slopes=slopes), 1e-6)


def test_gradient_of_the_slopes() -> None:
    tensors = make(1, 2, 1, 6, 6, 4, torch.float64)
    slopes = torch.tensor([0.3, 0.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: entmax_attention(*tensors, alibi_slopes=s), (slopes,), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_gradcheck(alpha: float) -> None:
    tensors = [t.requires_grad_() for t in make(1, 2, 1, 4, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: entmax_attention(*t, alpha=alpha), tensors, eps=1e-7, atol=1e-5)


def test_alpha_one_is_pytorchs_softmax_attention() -> None:
    query, key, value = make(2, 4, 4, 10, 10, 8, torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert_close("output", entmax_attention(query, key, value, alpha=1.0), expected, 1e-6)
    difference = (entmax_attention(query, key, value) - expected).norm() / expected.norm()
    assert difference > 0.05, "entmax must not be softmax"


def test_strided_inputs() -> None:
    query, key, value = make(2, 4, 2, 7, 7, 8, torch.float32)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    assert_close("output", entmax_attention(*strided), entmax_attention(query, key, value), 1e-6)


def test_rows_in_parts_equal_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = make(2, 4, 2, 23, 23, 8, torch.float32)
    mask = padding(2, 23, "left")
    slopes = torch.linspace(0, 1, 4)
    whole = entmax_attention(query, key, value, attention_mask=mask, alibi_slopes=slopes)
    monkeypatch.setattr(eager_module, "_SCORES_AT_ONCE", 2 * 4 * 23 * 5)
    parts = entmax_attention(query, key, value, attention_mask=mask, alibi_slopes=slopes)
    assert_close("output", parts, whole, 1e-6)


def test_autocast_does_not_round_the_scores() -> None:
    tensors = make(1, 2, 2, 20, 20, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = entmax_attention(*tensors)
    assert torch.equal(inside, entmax_attention(*tensors))


@pytest.mark.slow
def test_the_compiled_function_has_no_graph_break() -> None:
    """Output and gradients with Inductor, the default backend of torch.compile."""
    tensors = [t.requires_grad_() for t in make(2, 4, 2, 16, 16, 8, torch.float32)]
    mask = padding(2, 16, "left")
    compiled = torch.compile(entmax_attention, fullgraph=True)
    actual = compiled(*tensors, attention_mask=mask)
    expected = entmax_attention(*tensors, attention_mask=mask)
    assert_close("output", actual, expected, 1e-5)
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_close("gradient", a, b, 1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (2, 1, 1, 9), (1, 1, 1, 9), (1, 4, 5, 9), (1, 4, 1, 9)])
@pytest.mark.parametrize("alpha", [1.0, 1.5])
def test_a_4d_mask_broadcasts(shape: tuple[int, ...], alpha: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    full = mask.expand(2, shape[1], 5, 9).contiguous()
    outputs = []
    for given in (mask, full):
        tensors = [tensor.requires_grad_() for tensor in make(2, 4, 2, 5, 9, 8, torch.float64)]
        output = entmax_attention(*tensors, alpha=alpha, attention_mask=given, alibi_slopes=torch.linspace(0, 1, 4))
        outputs.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*outputs, strict=True))
