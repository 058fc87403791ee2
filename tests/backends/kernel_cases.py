"""The grid of calls that the kernels are tested on: shapes, masks, types and kinds of input, by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_asentmax import entmax_attention

__all__ = ["GPU_CASES", "SMALL_CASES", "TOLERANCES", "Case", "definition", "options", "tensors"]

# Relative error in the Frobenius norm; gradients may have twice as much.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        kind: of input: random, sharp (queries x 8), near-uniform (x 0.05), equal (all keys alike), huge (scores in the
            thousands), one (every query is a multiple of one key), topical (runs of keys share a direction).
        mask: None, left, right, holes, nothing (a batch entry without keys), free, free_heads.
        packed: boundaries of packed sequences.
        starts: the first key of each query is given, of documents that differ from row to row of the batch.
        alibi: slopes 1/h on the first half of the heads, 0 on the rest.
        strided: inputs are views of (batch, length, heads, head_dim) memory.
    """

    name: str
    q_len: int = 70
    kv_len: int | None = None
    batch: int = 1
    heads: int = 2
    kv_heads: int | None = None
    head_dim: int = 32
    value_dim: int | None = None
    dtype: torch.dtype = torch.float32
    kind: str = "random"
    alpha: float = 1.5
    causal: bool = True
    mask: str | None = None
    packed: tuple[int, ...] | None = None
    starts: bool = False
    alibi: bool = False
    strided: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len


def _scale_inputs(case: Case, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    factor = {"sharp": 8.0, "near-uniform": 0.05, "huge": 300.0}.get(case.kind, 1.0)
    query = query * factor
    if case.kind == "equal":
        key = key[:, :, :1].expand_as(key)
    elif case.kind == "one":
        group = query.shape[1] // key.shape[1]
        last = key.repeat_interleave(group, 1)[:, :, :1]
        query = 20.0 * last.expand_as(query) + 0.1 * query
    elif case.kind == "topical":
        runs = torch.nn.functional.normalize(torch.randn(case.keys // 32 + 1, case.head_dim), dim=-1)
        runs = runs.repeat_interleave(32, 0)[: case.keys] * case.head_dim**0.5
        key = 0.5 * key + runs
        query = 0.5 * query + 2.0 * runs[torch.randint(0, case.keys, (case.q_len,))]
    return query, key


def tensors(case: Case, device: str) -> list[torch.Tensor]:
    """[query, key, value, grad_output] of the case's type on the device; the same on every call."""
    torch.manual_seed(1)
    kv_heads = case.kv_heads or case.heads
    value_dim = case.value_dim or case.head_dim
    query = torch.randn(case.batch, case.heads, case.q_len, case.head_dim)
    key = torch.randn(case.batch, kv_heads, case.keys, case.head_dim)
    value = torch.randn(case.batch, kv_heads, case.keys, value_dim)
    grad = torch.randn(case.batch, case.heads, case.q_len, value_dim)
    query, key = _scale_inputs(case, query, key)
    made = [tensor.to(device=device, dtype=case.dtype) for tensor in (query, key, value, grad)]
    if case.strided:
        made = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in made]
    return made


def options(case: Case, device: str) -> dict[str, Any]:
    """The keyword arguments of entmax_attention, but for backend."""
    torch.manual_seed(2)
    batch, heads, q_len, kv_len = case.batch, case.heads, case.q_len, case.keys
    mask = None
    if case.mask in ("free", "free_heads"):
        mask = torch.rand(batch, heads if case.mask == "free_heads" else 1, q_len, kv_len) < 0.3
    elif case.mask is not None:
        mask = torch.ones(batch, kv_len, dtype=torch.bool)
        for entry in range(batch):
            gap = (entry + 1) * kv_len // (batch + 2)
            if case.mask == "left":
                mask[entry, :gap] = False
            elif case.mask == "right":
                mask[entry, kv_len - gap :] = False
            elif case.mask == "holes":
                mask[entry] = torch.rand(kv_len) < 0.5
        if case.mask == "nothing":
            mask[0] = False
    slopes = None
    if case.alibi:
        slopes = torch.zeros(heads)
        slopes[: heads // 2] = 1.0 / torch.arange(1, heads // 2 + 1)
    packed = None if case.packed is None else torch.tensor(case.packed, dtype=torch.int32)
    starts = None
    if case.starts:
        begins = torch.rand(batch, q_len) < 4 / q_len
        position = torch.arange(q_len) + kv_len - q_len
        starts = torch.where(begins, position, 0).cummax(dim=1).values.to(torch.int32)
    moved = {"attention_mask": mask, "alibi_slopes": slopes, "cu_seqlens": packed, "key_start": starts}
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()}
    return {"alpha": case.alpha, "is_causal": case.causal, **moved, **case.more}


_SCORES_AT_ONCE = 2**24


def definition(inputs: list[torch.Tensor], grad: torch.Tensor, settings: dict[str, Any]) -> list[torch.Tensor]:
    """[output, dq, dk, dv] of entmax_attention's eager backend in float64, for inputs [query, key, value].

    Some batch entries and the query heads of one key head at a time: tests share a GPU's memory.
    """
    query, key, value = (tensor.detach().double() for tensor in inputs)
    grad = grad.double()
    members = query.shape[1] // key.shape[1]
    entries = max(1, _SCORES_AT_ONCE // (members * query.shape[2] * key.shape[2]))
    mask, slopes = settings.get("attention_mask"), settings.get("alibi_slopes")
    starts = settings.get("key_start")
    results = [torch.empty_like(tensor) for tensor in (grad, query, key, value)]
    for entry in range(0, query.shape[0], entries):
        for kv_head in range(key.shape[1]):
            batch, one = slice(entry, entry + entries), slice(kv_head, kv_head + 1)
            heads = slice(kv_head * members, (kv_head + 1) * members)
            part = {**settings, "alibi_slopes": None if slopes is None else slopes[heads]}
            if mask is not None:
                part["attention_mask"] = mask[batch, heads] if mask.ndim == 4 and mask.shape[1] > 1 else mask[batch]
            if starts is not None:
                part["key_start"] = starts[batch]
            leaves = [query[batch, heads], key[batch, one], value[batch, one]]
            leaves = [leaf.clone().requires_grad_() for leaf in leaves]
            output = entmax_attention(*leaves, backend="eager", **part)
            grads = torch.autograd.grad(output, leaves, grad[batch, heads])
            for whole, where, found in zip(results, (heads, heads, one, one), (output.detach(), *grads), strict=True):
                whole[batch, where] = found
    return results


_F16, _BF16 = torch.float16, torch.bfloat16

# These run through the interpreter where there is no GPU. The names say which kernels they reach: one program holds a
# head (short kernels forward and backward), short rows (short forward, dense backward), or dense tiles.
SMALL_CASES = [
    Case("head"),
    Case("head-one-key", q_len=1),
    Case("head-decode", q_len=1, kv_len=77),
    Case("head-half", dtype=_F16, q_len=128, head_dim=16),
    Case("head-grouped", heads=4, kv_heads=2, q_len=33, kv_len=50, head_dim=24, value_dim=40),
    Case("head-alpha-1.3", alpha=1.3, q_len=40, causal=False),
    Case("head-alpha-2-softcap", alpha=2.0, q_len=40, more={"softcap": 3.0}),
    Case("head-left", q_len=40, batch=2, mask="left", alibi=True, strided=True),
    Case("head-nothing", q_len=40, batch=2, mask="nothing", causal=False),
    Case("head-equal", q_len=63, kind="equal"),
    Case("head-huge", q_len=63, kind="huge"),
    Case("head-starts", q_len=60, batch=2, starts=True, alibi=True),
    Case("short", dtype=_F16, q_len=150, head_dim=16),
    Case("short-window-alibi", dtype=_F16, q_len=200, head_dim=16, alibi=True, more={"sliding_window": 60}),
    Case("short-holes", dtype=_F16, q_len=130, batch=2, head_dim=16, mask="holes"),
    Case("short-packed", dtype=_F16, q_len=190, head_dim=16, packed=(0, 1, 1, 70, 190)),
    Case("short-free", dtype=_F16, q_len=140, head_dim=16, mask="free", causal=False),
    Case("short-grouped", dtype=_F16, q_len=60, kv_len=200, heads=4, kv_heads=1, head_dim=20, value_dim=40),
    Case("short-few-queries", dtype=_F16, q_len=3, kv_len=150, heads=1, head_dim=16),
    Case("dense", q_len=150, heads=1),
    Case("dense-few-queries", dtype=_F16, q_len=3, kv_len=300, heads=1, head_dim=16),
    Case("dense-grouped", heads=2, kv_heads=1, q_len=70, kv_len=200, head_dim=20, value_dim=40),
    Case("dense-full-more-queries", q_len=200, kv_len=150, heads=1, causal=False, strided=True),
    Case("dense-half-guess", q_len=20, kv_len=2400, heads=1, dtype=_F16, head_dim=16, kind="near-uniform"),
    Case("dense-half-uniform", q_len=280, heads=1, dtype=_F16, head_dim=16, kind="near-uniform"),
    Case("dense-alpha-2", q_len=150, heads=1, alpha=2.0),
    Case("dense-alpha-1.3", q_len=150, heads=1, alpha=1.3),
    Case("dense-alibi", q_len=300, alibi=True),
    Case("dense-alibi-full", q_len=150, alibi=True, causal=False),
    Case("dense-window-full", q_len=150, heads=1, causal=False, more={"sliding_window": 20}),
    Case("dense-softcap", q_len=150, heads=1, kind="sharp", more={"softcap": 5.0}),
    Case("dense-left", q_len=150, heads=1, batch=2, mask="left"),
    Case("dense-holes", q_len=150, heads=1, batch=2, mask="holes", alibi=False),
    Case("dense-packed", q_len=200, heads=1, packed=(0, 5, 5, 90, 200)),
    Case("dense-starts", q_len=150, batch=2, starts=True, alibi=True, mask="left"),
    Case("dense-starts-few", q_len=2, kv_len=300, batch=2, starts=True),
    Case("dense-free-all", q_len=70, kv_len=150, batch=2, mask="free_heads", alibi=True, more={"sliding_window": 60}),
    Case("dense-equal", q_len=140, heads=1, kind="equal"),
    Case("dense-huge", q_len=150, heads=1, kind="huge"),
    Case("dense-one", q_len=150, heads=1, kind="one"),
    Case("head-training", dtype=_BF16, q_len=72, alibi=True, strided=True),
    Case("short-training", dtype=_BF16, q_len=131, alibi=True, strided=True),
    Case("short-training-equal", dtype=_BF16, q_len=131, kind="equal", alibi=True),
    Case("dense-training", dtype=_BF16, q_len=300, head_dim=16, alibi=True),
]


def _gpu_cases() -> list[Case]:
    cases = [replace(case, name=f"{case.name}-bf16", dtype=_BF16) for case in SMALL_CASES if case.dtype != _BF16]
    for head_dim in (16, 64, 80, 96, 112, 128, 256):
        cases.append(Case(f"dim-{head_dim}", q_len=711, heads=2, head_dim=head_dim, dtype=_BF16))
    cases += [Case(f"dim-{dim}-exact", q_len=333, heads=2, head_dim=dim) for dim in (80, 128, 256)]
    for kind in ("random", "sharp", "near-uniform", "equal", "one", "topical"):
        cases.append(Case(f"long-{kind}", q_len=3001, head_dim=64, kind=kind, dtype=_BF16))
    cases += [
        Case("long-f16-near-uniform", q_len=6200, head_dim=64, kind="near-uniform", dtype=_F16),
        Case("long-exact", q_len=2100, head_dim=64),
        Case("long-alpha-1.3", q_len=2100, head_dim=64, alpha=1.3, dtype=_BF16),
        Case("long-alpha-2", q_len=2100, head_dim=64, alpha=2.0, dtype=_BF16),
        Case("long-alibi", q_len=6500, heads=4, head_dim=64, alibi=True, dtype=_BF16),
        Case("long-alibi-full", q_len=2500, heads=4, head_dim=64, alibi=True, causal=False, dtype=_BF16),
        Case("long-window", q_len=6500, head_dim=64, dtype=_BF16, more={"sliding_window": 257}),
        Case("long-packed", q_len=6500, head_dim=64, dtype=_BF16, packed=(0, 3, 1000, 1001, 4000, 6500)),
        Case("long-starts", q_len=6500, batch=2, head_dim=64, dtype=_BF16, starts=True, alibi=True),
        Case("long-left", q_len=2500, batch=3, head_dim=64, dtype=_BF16, mask="left"),
        Case("long-holes", q_len=2500, batch=2, head_dim=64, dtype=_BF16, mask="holes"),
        Case("long-free", q_len=1500, batch=2, head_dim=64, dtype=_BF16, mask="free_heads", causal=False),
        Case("long-grouped", q_len=1500, kv_len=2777, heads=8, kv_heads=2, head_dim=128, dtype=_BF16, strided=True),
        Case("many-heads", q_len=16, batch=70000, heads=1, head_dim=16, dtype=_BF16),
        Case("many-heads-short", q_len=200, batch=1100, heads=16, head_dim=32, dtype=_BF16),
    ]
    return cases


GPU_CASES = _gpu_cases()
