"""The lists alone, against the plain definition in float64: outputs, gradients, lists, overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_asentmax import entmax_attention
from hf_asentmax.backends.triton.common.blocks import ROW_BLOCK
from hf_asentmax.backends.triton.common.problem import Problem
from hf_asentmax.backends.triton.common.row_ranges import row_ranges
from hf_asentmax.backends.triton.common.state import Gradients
from hf_asentmax.backends.triton.lists.device import Lists
from hf_asentmax.backends.triton.lists.launch import column_ends, lists_backward, lists_forward
from hf_asentmax.backends.triton.lists.tiles import ListTiles, list_tiles, lists_unsupported_reason
from hf_asentmax.masks import Masks

from reference import assert_close

FORWARD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
ON_GPU = torch.cuda.is_available()
HALF_TYPES = [torch.bfloat16, torch.float16]


def tiles_of(dtype: torch.dtype, head_dim: int, **changes: int) -> ListTiles:
    """The usual tiles, but fewer and larger programs for the interpreter, which needs time for each."""
    tiles = list_tiles(dtype, head_dim)
    if not ON_GPU:
        tiles = tiles._replace(rows=64, list_rows=32, expand_rows=32)
    return tiles._replace(**changes)


class Call:
    """Tensors of one call, its results by lists, and the reference's."""

    def __init__(
        self,
        device: str,
        *,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int = 1,
        q_len: int = 70,
        kv_len: int = 150,
        head_dim: int = 16,
        value_dim: int | None = None,
        alpha: float = 1.5,
        query_factor: float = 3.0,
        slopes: list[float] | None = None,
        transposed: bool = False,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(q_len * 1000 + kv_len)

        def draw(heads: int, length: int, dim: int) -> torch.Tensor:
            shape = (batch, length, heads, dim) if transposed else (batch, heads, length, dim)
            tensor = torch.randn(shape, generator=generator)
            return (tensor.transpose(1, 2) if transposed else tensor).to(device, dtype)

        self.query = draw(heads, q_len, head_dim) * query_factor
        self.key = draw(kv_heads, kv_len, head_dim)
        self.value = draw(kv_heads, kv_len, value_dim or head_dim)
        self.grad = draw(heads, q_len, value_dim or head_dim)
        self.options = {"alpha": alpha, "is_causal": options.pop("is_causal", True)}
        self.slopes = None if slopes is None else torch.tensor(slopes, device=device)
        self.mask = options.pop("attention_mask", None)
        self.cu_seqlens = options.pop("cu_seqlens", None)
        self.window = options.pop("sliding_window", None)
        self.key_start = options.pop("key_start", None)
        self.key_start = None if self.key_start is None else self.key_start.to(device)
        self.mask = None if self.mask is None else self.mask.to(device)
        self.cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        assert not options
        masks = Masks(attention_mask=self.mask, cu_seqlens=self.cu_seqlens, key_start=self.key_start)
        ranges = row_ranges(q_len, kv_len, masks)
        is_causal = self.options["is_causal"]
        self.problem = Problem(
            self.query, self.key, self.value, alpha, 1 / math.sqrt(head_dim), is_causal, self.window, None,
            self.slopes, ranges,
        )  # fmt: skip
        assert lists_unsupported_reason(self.problem) is None

    def run(self, tiles: ListTiles, deterministic: bool = False) -> Lists:
        key, value = self.key, self.value
        self.output = torch.full((*self.query.shape[:3], value.shape[3]), math.nan).to(self.query)
        self.tau = torch.full(self.query.shape[:3], math.nan, device=key.device)
        norms = key.float().norm(dim=-1).amax(-1).reshape(-1)
        self.mean_value = torch.full_like(self.output, math.nan)
        lists = lists_forward(self.problem, self.output, self.tau, self.mean_value, norms, tiles)
        self.query_grad = torch.full_like(self.query, math.nan)
        self.key_grad, self.value_grad = torch.full_like(key, math.nan), torch.full_like(value, math.nan)
        lists_backward(
            self.problem, self.tau, self.mean_value, lists,
            Gradients(self.grad, self.query_grad, self.key_grad, self.value_grad),
            column_ends(lists.column_counts), deterministic=deterministic, tiles=tiles,
        )  # fmt: skip
        return lists

    def reference(self) -> tuple[torch.Tensor, ...]:
        """(output, dq, dk, dv) in float64."""
        exact = [tensor.detach().double().requires_grad_() for tensor in (self.query, self.key, self.value)]
        output = entmax_attention(
            *exact,
            alibi_slopes=None if self.slopes is None else self.slopes.double(),
            attention_mask=self.mask,
            cu_seqlens=self.cu_seqlens,
            sliding_window=self.window,
            key_start=self.key_start,
            backend="eager",
            **self.options,
        )
        output.backward(self.grad.double())
        return (output.detach(), *(tensor.grad for tensor in exact))

    def check(self, tolerance: float) -> None:
        ours = (self.output, self.query_grad, self.key_grad, self.value_grad)
        for name, mine, exact in zip(("output", "dq", "dk", "dv"), ours, self.reference(), strict=True):
            # rows with one key have no dq and dk but rounding
            scale = exact.norm().clamp_min(1e-3 * self.grad.double().norm())
            error = (mine.double() - exact).norm() / scale
            limit = tolerance if name == "output" else 2 * tolerance
            assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.0e}"


def padding(batch: int, kv_len: int, holes: bool) -> torch.Tensor:
    mask = torch.ones(batch, kv_len, dtype=torch.bool)
    mask[0, :37] = False
    mask[-1, kv_len - 20 :] = False
    if holes:
        mask[:, 60:80] = False
    return mask


CASES: dict[str, dict[str, Any]] = {
    "cache": {},
    "one query": {"q_len": 1, "kv_len": 90},
    "one key": {"q_len": 1, "kv_len": 1},
    "sparsemax": {"alpha": 2.0, "heads": 1},
    "alpha 1.7": {"alpha": 1.7, "heads": 1},
    "both ways": {"is_causal": False, "q_len": 40, "slopes": [0.2, 0.0], "query_factor": 5.0},
    "alibi": {"q_len": 80, "kv_len": 90, "slopes": [0.0, 0.5]},
    "window": {"sliding_window": 40, "heads": 1},
    "packed": {"q_len": 150, "heads": 1, "cu_seqlens": torch.tensor([0, 3, 70, 71, 150])},
    "starts": {
        "batch": 2,
        "q_len": 150,
        "heads": 1,
        "key_start": torch.tensor([[0] * 70 + [70] * 80, [0] * 3 + [3] * 97 + [100] * 50], dtype=torch.int32),
    },
    "left and right padding": {"batch": 2, "q_len": 90, "heads": 1, "attention_mask": padding(2, 150, holes=False)},
    "padding with holes": {"batch": 2, "attention_mask": padding(2, 150, holes=True), "slopes": [0.0, 0.3]},
    "strides, odd dims": {"head_dim": 20, "value_dim": 24, "kv_heads": 2, "transposed": True},
}


# The quick tests keep these; the others take the same kernels through other masks
QUICK = ("padding with holes", "alibi")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_float32(name: str, device: str) -> None:
    call = Call(device, **CASES[name])
    lists = call.run(tiles_of(torch.float32, 16))
    assert not lists.overflow.any()
    call.check(FORWARD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half(dtype: torch.dtype, device: str) -> None:
    call = Call(device, dtype=dtype, q_len=70, kv_len=200, slopes=[0.0, 0.05], query_factor=4.0)
    lists = call.run(tiles_of(dtype, 16))
    assert not lists.overflow.any()
    call.check(FORWARD_TOLERANCE[dtype])


def test_lists_hold_the_support(device: str) -> None:
    call = Call(device, q_len=64, kv_len=150)
    lists = call.run(tiles_of(torch.float32, 16))
    scores = call.query.double() @ call.key.double().transpose(-1, -2) * call.problem.scale * 0.5
    hidden = torch.ones(64, 150, dtype=torch.bool, device=device).triu(87)
    support = ((scores.masked_fill(hidden, -math.inf) - call.tau.double()[..., None]) > 1e-5)[0]
    for head in range(2):
        for row in range(64):
            begin = lists.offsets[head, row]
            listed = lists.listed[head, begin : begin + lists.counts[head, row]].tolist()
            assert len(set(listed)) == len(listed)
            assert set(support[head, row].nonzero().flatten().tolist()) <= set(listed)
            assert len(listed) <= 2 * support[head, row].sum() + 5


def test_overflow_is_flagged_and_left_alone(device: str) -> None:
    """Rows 0 to 127 are sharp; some of the others have more keys than there is room for."""
    call = Call(device, q_len=256, kv_len=256, heads=1)
    call.query[:, :, 130] = 0.0
    lists = call.run(tiles_of(torch.float32, 16, room=64))
    assert lists.overflow.tolist() == [[0, 1]]
    exact, dq, _, _ = call.reference()
    done = slice(0, ROW_BLOCK)
    assert (call.output[:, :, done].double() - exact[:, :, done]).norm() <= 1e-5 * exact[:, :, done].norm()
    assert (call.query_grad[:, :, done].double() - dq[:, :, done]).norm() <= 2e-5 * dq[:, :, done].norm()
    assert call.query_grad[:, :, ROW_BLOCK:].isnan().all()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_rows_that_are_no_numbers_are_flagged(number: float, device: str) -> None:
    call = Call(device, q_len=130)
    call.query[0, 1, 3, 5] = number
    assert call.run(tiles_of(torch.float32, 16)).overflow.tolist() == [[0, 0], [1, 0]]


def test_rows_without_keys_give_zeros(device: str) -> None:
    mask = torch.zeros(1, 150, dtype=torch.bool)
    call = Call(device, attention_mask=mask)
    lists = call.run(tiles_of(torch.float32, 16))
    assert not lists.overflow.any() and not lists.counts.any()
    assert not call.output.any() and not call.query_grad.any() and not call.key_grad.any()
    assert (call.tau == math.inf).all()


@pytest.mark.slow
def test_equal_and_huge_scores(device: str) -> None:
    call = Call(device, q_len=30, kv_len=30)
    call.key[:] = call.key[:, :, :1]
    call.run(tiles_of(torch.float32, 16))
    exact = call.reference()
    assert (call.output.double() - exact[0]).norm() <= 1e-5 * exact[0].norm()
    assert (call.value_grad.double() - exact[3]).norm() <= 2e-5 * exact[3].norm()
    assert call.query_grad.abs().max() <= 1e-4  # exactly zero
    call = Call(device, query_factor=1e3)
    call.run(tiles_of(torch.float32, 16))
    assert (call.output.double() - call.reference()[0]).norm() <= 1e-5 * call.reference()[0].norm()
    assert Call(device, query_factor=1e6).run(tiles_of(torch.float32, 16)).overflow.all()


def test_deterministic(device: str) -> None:
    call = Call(device, q_len=40, kv_len=40, slopes=[0.0, 0.2])
    tiles = tiles_of(torch.float32, 16)
    call.run(tiles, deterministic=True)
    call.check(1e-5)
    first = call.key_grad.clone(), call.value_grad.clone()
    call.run(tiles, deterministic=True)
    assert torch.equal(first[0], call.key_grad) and torch.equal(first[1], call.value_grad)


def test_lists_that_outgrow_their_room_are_flagged(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three keys a row on average, not all row blocks get lists; those that do are exact."""
    monkeypatch.setattr("hf_asentmax.backends.triton.lists.tiles._KEYS_A_ROW", 3)
    call = Call(device, q_len=256, kv_len=256, heads=1)
    lists = call.run(tiles_of(torch.float32, 16))
    assert lists.overflow.any()
    ends = lists.offsets + lists.counts
    assert ends[lists.counts > 0].max() <= lists.listed.shape[1]
    exact = call.reference()[0]
    for head, block in (lists.overflow == 0).nonzero().tolist():
        rows = slice(block * ROW_BLOCK, (block + 1) * ROW_BLOCK)
        assert_close("output", call.output[:, head, rows], exact[:, head, rows], 1e-5)


def test_no_list_lacks_room_where_two_runs_must_agree(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which lists find no room depends on the order of the programs, so there must be room for all."""
    monkeypatch.setattr("hf_asentmax.backends.triton.lists.tiles._KEYS_A_ROW", 1)
    torch.use_deterministic_algorithms(True)
    try:
        lists = Call(device, q_len=80, kv_len=80, heads=1).run(tiles_of(torch.float32, 16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not lists.overflow.any()


@pytest.mark.slow
def test_chunks_of_row_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_asentmax.backends.triton.lists.workspace._WORKSPACE_BYTES", 40_000)
    call = Call(device, q_len=70, heads=3, kv_heads=3)
    call.run(tiles_of(torch.float32, 16))
    call.check(1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long(dtype: torch.dtype, head_dim: int) -> None:
    if not ON_GPU:
        pytest.skip("needs a GPU")
    if dtype == torch.float32 and head_dim == 256:
        pytest.skip("the dense regime does these")
    slopes = [0.0, 0.01, 0.0, 0.5]
    call = Call("cuda", dtype=dtype, heads=4, kv_heads=2, q_len=1111, kv_len=1400, head_dim=head_dim, slopes=slopes)
    lists = call.run(list_tiles(dtype, head_dim))
    assert not lists.overflow.any()
    call.check(FORWARD_TOLERANCE[dtype])
    again = call.key_grad.clone()
    call.run(list_tiles(dtype, head_dim), deterministic=True)
    call.check(FORWARD_TOLERANCE[dtype])
    assert_close("the two ways", again, call.key_grad, 2 * FORWARD_TOLERANCE[dtype])
