"""The decoding kernels: a few queries against many keys, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_asentmax import entmax_attention
from hf_asentmax.backends.triton.common.problem import Problem
from hf_asentmax.backends.triton.common.row_ranges import RowRanges
from hf_asentmax.backends.triton.decode import launch as decode_launch
from hf_asentmax.backends.triton.decode import operator as decode_op
from hf_asentmax.backends.triton.decode.launch import DecodeTiles

from calls import call_of
from kernel_cases import TOLERANCES, Case, options, tensors
from reference import assert_close

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU_ONLY = [pytest.mark.gpu, on_gpu]
_F16, _BF16 = torch.float16, torch.bfloat16

SMALL = [
    Case("one-query", q_len=1, kv_len=333),
    Case("grouped", q_len=1, kv_len=401, heads=4, kv_heads=2),
    Case("one-key-head", q_len=1, kv_len=260, heads=20, kv_heads=1, head_dim=16),
    Case("few-queries", q_len=5, kv_len=300, heads=6, kv_heads=2, head_dim=24, value_dim=40, strided=True),
    Case("sixteen-queries", q_len=16, kv_len=290, heads=3, kv_heads=1, head_dim=16),
    Case("half", q_len=2, kv_len=385, heads=4, kv_heads=2, dtype=_F16),
    Case("half-near-uniform", q_len=1, kv_len=900, kind="near-uniform", dtype=_F16),
    Case("near-uniform", q_len=1, kv_len=1300, kind="near-uniform"),
    Case("equal", q_len=1, kv_len=1025, kind="equal"),
    Case("one-in-the-support", q_len=1, kv_len=513, kind="one"),
    Case("sharp", q_len=2, kv_len=513, kind="sharp"),
    Case("huge", q_len=1, kv_len=513, kind="huge"),
    Case("topical", q_len=3, kv_len=640, kind="topical"),
    Case("alpha-2", q_len=1, kv_len=400, alpha=2.0),
    Case("alpha-1.3", q_len=1, kv_len=400, alpha=1.3),
    Case("softcap", q_len=2, kv_len=400, kind="sharp", more={"softcap": 3.0}),
    Case("alibi", q_len=3, kv_len=400, heads=4, kv_heads=2, alibi=True),
    Case("alibi-full", q_len=3, kv_len=400, alibi=True, causal=False),
    Case("window", q_len=3, kv_len=500, more={"sliding_window": 100}),
    Case("window-full", q_len=3, kv_len=500, causal=False, more={"sliding_window": 100}),
    Case("left", q_len=1, kv_len=500, batch=3, mask="left", alibi=True),
    Case("right", q_len=2, kv_len=300, batch=2, mask="right", causal=False),
    Case("holes", q_len=2, kv_len=400, batch=2, mask="holes", alibi=True),
    Case("no-keys", q_len=2, kv_len=400, batch=2, mask="nothing"),
    Case("free", q_len=3, kv_len=400, batch=2, heads=4, kv_heads=2, mask="free", causal=False, alibi=True),
    Case("free-row", q_len=1, kv_len=400, batch=2, heads=4, kv_heads=2, mask="free", causal=False, alibi=True),
    Case("free-heads", q_len=3, kv_len=400, batch=2, heads=4, kv_heads=2, mask="free_heads", causal=False),
    Case("brain", q_len=2, kv_len=385, heads=4, kv_heads=2, mask="left", alibi=True, dtype=_BF16),
    Case("brain-near-uniform", q_len=1, kv_len=900, kind="near-uniform", dtype=_BF16),
]


def _gpu_cases() -> list[Case]:
    cases = [replace(case, name=f"{case.name}-bf16", dtype=_BF16) for case in SMALL if case.dtype != _BF16]
    grouped: dict[str, Any] = {"q_len": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": _BF16}
    cases += [Case(f"long-{length}", kv_len=length, **grouped) for length in (4097, 32768, 131071, 131072)]
    cases += [
        Case("long-near-uniform", kv_len=131072, kind="near-uniform", **grouped),
        Case("flat-alibi", kv_len=50001, kind="near-uniform", alibi=True, **grouped),
        Case("flat-left", kv_len=50001, batch=2, kind="near-uniform", mask="left", **grouped),
        Case("flat-few-tiles", kv_len=40000, batch=4, kind="near-uniform", **grouped),
        Case("flat-many", kv_len=50000, batch=40, kind="near-uniform", **grouped),
        Case("long-equal", kv_len=40001, kind="equal", **grouped),
        Case("long-topical", kv_len=32768, kind="topical", **grouped),
        Case("long-alibi", kv_len=131072, alibi=True, **grouped),
        Case("long-window", kv_len=131072, more={"sliding_window": 4096}, **grouped),
        Case("long-left", kv_len=20001, batch=3, mask="left", alibi=True, **grouped),
        Case("long-holes", kv_len=20001, batch=3, mask="holes", **grouped),
        Case("long-row", kv_len=20001, batch=3, mask="free", causal=False, alibi=True, **grouped),
        Case("long-free", kv_len=20001, batch=3, mask="free", causal=False, **{**grouped, "q_len": 2}),
        Case("million", q_len=1, kv_len=1_000_003, heads=2, kv_heads=1, head_dim=64, dtype=_BF16),
        Case("chunk", q_len=16, kv_len=9001, heads=8, kv_heads=1, head_dim=64, dtype=_BF16, alibi=True),
        Case("many", q_len=1, kv_len=3000, batch=300, heads=8, kv_heads=4, head_dim=64, dtype=_BF16),
        Case("wide", q_len=1, kv_len=3000, heads=4, kv_heads=2, head_dim=256, dtype=_BF16),
        Case("exact", q_len=1, kv_len=5000, heads=4, kv_heads=2, head_dim=128),
        Case("dim-80", q_len=4, kv_len=5000, heads=4, kv_heads=2, head_dim=80, value_dim=96, dtype=_F16),
    ]
    return cases


@torch.no_grad()
def check(case: Case, device: str) -> None:
    query, key, value, _ = tensors(case, device)
    settings = options(case, device)
    assert decode_op.decodes(call_of(query, key, value))
    actual = entmax_attention(query, key, value, backend="triton", **settings)
    expected = entmax_attention(query.double(), key.double(), value.double(), backend="eager", **settings)
    tolerance = max(TOLERANCES[case.dtype], 5e-4 if case.kind == "huge" else 0.0)
    assert_close(case.name, actual, expected, tolerance)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=GPU_ONLY) for case in _gpu_cases()])
def test_on_gpu(case: Case) -> None:
    check(case, "cuda")


def decoded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    slopes: torch.Tensor | None = None,
    key_norm_bound: torch.Tensor | None = None,
    **changes: int,
) -> torch.Tensor:
    """Output of the kernels with some sizes other than those of decode_tiles."""
    ranges = RowRanges(None, None, None, None, None)
    problem = Problem(query, key, value, 1.5, query.shape[3] ** -0.5, True, None, None, slopes, ranges)
    output = torch.full((*query.shape[:3], value.shape[3]), 7.0, dtype=query.dtype, device=query.device)
    sizes: DecodeTiles = decode_launch.decode_tiles(problem)._replace(**changes)
    decode_launch.decode(problem, output, key_norm_bound, sizes)
    return output


@pytest.mark.parametrize("kind", ["random", "near-uniform"])
def test_any_number_of_splits_gives_the_same_bits(kind: str, device: str) -> None:
    case = Case("splits", q_len=2, kv_len=529, heads=2, kv_heads=1, head_dim=16, kind=kind)
    query, key, value, _ = tensors(case, device)
    first = decoded(query, key, value, tiles=1)
    for tiles in (2, 8, 32):
        assert torch.equal(decoded(query, key, value, tiles=tiles), first)
    assert torch.equal(decoded(query, key, value, tiles=1), first)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"parts": 1}, "random"),
        ({"parts": 1}, "near-uniform"),
        ({"parts": 5, "values": 16}, "near-uniform"),
        ({"parts": 5, "values": 16}, "equal"),
        ({"keys": 16}, "random"),
        ({"output_warps": 8, "values": 128}, "near-uniform"),
    ],
    ids=str,
)
def test_sizes(changes: dict[str, int], kind: str, device: str) -> None:
    """Few or many programs for a row, small and large tiles."""
    case = Case("sizes", q_len=1, kv_len=1000, head_dim=16, kind=kind)
    query, key, value, _ = tensors(case, device)
    slopes = torch.tensor([0.01, 0.0], device=device)
    expected = entmax_attention(
        query.double(), key.double(), value.double(), backend="eager", alibi_slopes=slopes.double()
    )
    assert_close("output", decoded(query, key, value, slopes=slopes, **changes), expected, 1e-5)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        (1, "random"),
        pytest.param(3, "near-uniform", marks=pytest.mark.slow),
        pytest.param(3, "equal", marks=pytest.mark.slow),
    ],
)
def test_rows_left_to_the_third_kernel(parts: int, kind: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a long cache: rows with many candidates beside others (the sharp one) in the same call."""
    monkeypatch.setattr(decode_launch, "_SHORT_TILES", 16)
    monkeypatch.setattr(decode_launch, "_MOST_TILES_LISTED", 8)
    query, key, value, _ = tensors(Case("flat", q_len=2, kv_len=1200, heads=4, kv_heads=2, kind=kind), device)
    query[:, 0] *= 50
    slopes = torch.tensor([0.0, 0.01, 0.0, 0.002], device=device)
    expected = entmax_attention(
        query.double(), key.double(), value.double(), backend="eager", alibi_slopes=slopes.double()
    )
    actual = decoded(query, key, value, slopes=slopes, parts=parts)
    assert_close("output", actual, expected, 1e-5)
    assert torch.equal(decoded(query, key, value, slopes=slopes, parts=parts), actual)


def test_more_tiles_than_are_looked_at_together(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _ = tensors(Case("chunks", q_len=1, kv_len=500, head_dim=16, alibi=True), device)
    slopes = torch.tensor([0.01, 0.0], device=device)
    expected = decoded(query, key, value, slopes=slopes, keys=16)
    monkeypatch.setattr(decode_launch, "_MOST_TILES_AT_ONCE", 16)
    assert_close("output", decoded(query, key, value, slopes=slopes, keys=16), expected, 1e-6)


def test_values_without_weight_are_not_read(device: str) -> None:
    query, key, value, _ = tensors(Case("support", q_len=1, kv_len=600, heads=1), device)
    identity = torch.eye(600, device=device)[None, None]
    weights = entmax_attention(query, key, identity[..., :256], backend="triton")  # of the first 256 keys
    value[:, :, :256][:, :, weights[0, 0, 0] == 0] = float("nan")
    assert entmax_attention(query, key, value, backend="triton").isfinite().all()
    assert (weights == 0).any()


@pytest.mark.parametrize(("static", "q_len"), [(False, 2), (True, 2), (True, 1)])
def test_keys_out_of_an_alibi_heads_reach_are_not_read(static: bool, q_len: int, device: str) -> None:
    """With a bound on the keys' norms. The keys out of reach are NaN, so that reading them would show."""
    query, key, value, _ = tensors(Case("reach", q_len=q_len, kv_len=900, heads=4, kv_heads=2, head_dim=16), device)
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.2], device=device)
    mask, filled = None, 900
    if static:
        filled = 700
        mask = torch.ones(1, 1, q_len, 900, dtype=torch.bool, device=device).tril(filled - q_len)
    norms = key.norm(dim=-1).amax(-1)
    expected = entmax_attention(
        query.double(),
        key.double(),
        value.double(),
        backend="eager",
        alibi_slopes=slopes.double(),
        attention_mask=mask,
        is_causal=mask is None,
    )
    key[:, :, : filled - 384] = float("nan")
    actual = entmax_attention(
        query,
        key,
        value,
        backend="triton",
        alibi_slopes=slopes,
        attention_mask=mask,
        is_causal=mask is None,
        key_norm_bound=norms,
    )
    assert_close("output", actual, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("q_len", [1, 2])
def test_short_spans_in_a_long_cache(q_len: int, device: str) -> None:
    """An ALiBi head that sees a few of 516 tiles (with a bound on the keys' norms) beside a head that sees them all."""
    query, key, value, _ = tensors(Case("spans", q_len=q_len, kv_len=33_000, heads=2, head_dim=16), device)
    slopes = torch.tensor([0.05, 0.0], device=device)
    expected = entmax_attention(
        query.double(), key.double(), value.double(), backend="eager", alibi_slopes=slopes.double()
    )
    bound = key.norm(dim=-1).amax(-1)
    key[:, 0, :-4096] = float("nan")  # of the head with ALiBi
    actual = entmax_attention(query, key, value, backend="triton", alibi_slopes=slopes, key_norm_bound=bound)
    assert_close("output", actual, expected, 1e-5)


@pytest.mark.parametrize("q_len", [1, 2])
def test_alibi_is_exact_far_from_the_end_of_a_static_cache(q_len: int, device: str) -> None:
    """The positions of queries are the cache's last; the keys that they see are its first."""
    kv_len, filled = (120_000, 400) if device == "cuda" else (3000, 400)
    query, key, value, _ = tensors(Case("static", q_len=q_len, kv_len=filled, head_dim=16), device)
    expected = entmax_attention(
        query.double(), key.double(), value.double(), backend="eager", alibi_slopes=torch.ones(2, device=device)
    )
    empty = torch.zeros(1, 2, kv_len - filled, 16, device=device)
    mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device).tril(filled - q_len)
    actual = entmax_attention(
        query,
        torch.cat([key, empty], 2),
        torch.cat([value, empty], 2),
        backend="triton",
        alibi_slopes=torch.ones(2, device=device),
        attention_mask=mask,
        is_causal=False,
    )
    assert_close("output", actual, expected, 1e-5)


def test_rows_without_keys_give_zeros_and_bad_numbers_show(device: str) -> None:
    query, key, value, _ = tensors(Case("bad", q_len=3, kv_len=400), device)
    mask = torch.ones(1, 1, 3, 400, dtype=torch.bool, device=device)
    mask[:, :, 0] = False
    mask[:, :, 1, 7] = False
    key[:, :, 7, 3] = float("nan")
    output = entmax_attention(query, key, value, backend="triton", attention_mask=mask, is_causal=False)
    assert not output[:, :, 0].any()
    assert output[:, :, 1].isfinite().all()
    assert output[:, :, 2].isnan().all()


@pytest.mark.parametrize(("batch", "heads", "q_len"), [(0, 2, 1), (1, 0, 1), (1, 2, 0)])
def test_nothing_in_nothing_out(batch: int, heads: int, q_len: int, device: str) -> None:
    query = torch.ones(batch, heads, q_len, 16, device=device)
    cache = torch.ones(batch, 1, 300, 16, device=device)
    assert entmax_attention(query, cache, cache, backend="triton").shape == query.shape


def test_a_window_wider_than_32_bits_count_hides_nothing(device: str) -> None:
    query, key, value, _ = tensors(Case("wide window", q_len=2, kv_len=300, head_dim=16), device)
    expected = entmax_attention(query, key, value, backend="triton")
    for window in (2**31 - 1, 2**40):
        assert torch.equal(entmax_attention(query, key, value, backend="triton", sliding_window=window), expected)


def test_each_step_equals_the_full_forward(device: str) -> None:
    case = Case("steps", q_len=290, heads=2, kv_heads=1, head_dim=16, dtype=_F16, alibi=True)
    query, key, value, _ = tensors(case, device)
    settings = options(case, device)
    full = entmax_attention(query, key, value, backend="triton", **settings)
    for first, last in ((257, 258), (274, 290)):
        seen = slice(0, last)
        part = entmax_attention(
            query[:, :, first:last], key[:, :, seen], value[:, :, seen], backend="triton", **settings
        )
        assert_close("step", part, full[:, :, first:last], 1e-3)


def test_calls_with_gradients_and_others_take_the_other_way(device: str) -> None:
    query, key, value, _ = tensors(Case("route", q_len=2, kv_len=300, head_dim=16), device)
    assert decode_op.decodes(call_of(query, key, value))
    assert not decode_op.decodes(
        call_of(query, key[:, :, : decode_op.DECODE_FROM], value[:, :, : decode_op.DECODE_FROM])
    )
    assert not decode_op.decodes(call_of(query.repeat(1, 1, 20, 1), key, value))
    query.requires_grad_()
    assert not decode_op.decodes(call_of(query, key, value))
    with torch.no_grad():
        assert decode_op.decodes(call_of(query, key, value))


def test_the_operator_passes_opcheck(device: str) -> None:
    query, key, value, _ = tensors(Case("op", q_len=2, kv_len=300, heads=1, head_dim=16), device)
    settings = (1.5, 0.25, True, None, None)
    torch.library.opcheck(
        torch.ops.hf_asentmax.entmax_decode.default, (query, key, value, None, None, None, None, *settings)
    )


@torch.no_grad()
def test_compiles_to_one_graph(device: str) -> None:
    torch.compiler.reset()
    case = Case("compiled", q_len=1, kv_len=300, batch=2, head_dim=16, mask="free", causal=False, alibi=True)
    *inputs, _ = tensors(case, device)
    settings = options(case, device)
    compiled = torch.compile(
        lambda *args: entmax_attention(*args, backend="triton", **settings),
        fullgraph=True,
        backend="inductor" if device == "cuda" else "aot_eager",
    )
    assert torch.equal(compiled(*inputs), entmax_attention(*inputs, backend="triton", **settings))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", ["random", "near-uniform"])
@pytest.mark.parametrize("kv_len", [3000, 40000, 131072])
@torch.no_grad()
def test_runs_in_a_cuda_graph_bit_by_bit(kv_len: int, kind: str) -> None:
    case = Case("graph", q_len=1, kv_len=kv_len, heads=8, kv_heads=2, head_dim=128, dtype=_BF16, kind=kind, mask="left")
    *inputs, _ = tensors(case, "cuda")
    settings = options(case, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = entmax_attention(*inputs, backend="triton", **settings).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            entmax_attention(*inputs, backend="triton", **settings)
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = entmax_attention(*inputs, backend="triton", **settings)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kv_len", [3000, 40000])
@torch.no_grad()
def test_overlapping_kernels_wait_for_one_another(kv_len: int) -> None:
    """Calls in a row on one cache, each right after a copy or a kernel has changed it."""
    case = Case("overlap", q_len=1, kv_len=kv_len, heads=8, kv_heads=2, head_dim=128, dtype=_BF16)
    query, key, value, _ = tensors(case, "cuda")
    sources = [torch.randn_like(key) for _ in range(6)]
    expected = [entmax_attention(query, source, value, backend="triton") for source in sources]

    def steps() -> list[torch.Tensor]:
        outputs = []
        for index, source in enumerate(sources):
            if index % 2:
                key.copy_(source)
            else:
                torch.add(source, 0.0, out=key)
            outputs.append(entmax_attention(query, key, value, backend="triton"))
        return outputs

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        alone = steps()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        for outputs in (alone, captured):
            assert all(torch.equal(mine, other) for mine, other in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(
    ("bound", "error", "message"),
    [
        (torch.ones(1, 3), ValueError, "one norm per key head"),
        (torch.ones(1, 2, dtype=torch.long), TypeError, "floating point"),
        (1.0, TypeError, "floating point"),
    ],
)
def test_a_bad_bound_is_refused(bound: Any, error: type[Exception], message: str) -> None:
    query, key, value, _ = tensors(Case("bound", q_len=1, kv_len=300, head_dim=16), "cpu")
    with pytest.raises(error, match=message):
        entmax_attention(query, key, value, key_norm_bound=bound)
