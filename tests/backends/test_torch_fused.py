"""Softmax attention by PyTorch's fused functions against the eager definition in float64: every kernel, every mask.

On the CPU PyTorch runs its own reference implementations of these functions. The fused kernels are tested on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from hf_asentmax import entmax_attention
from hf_asentmax.backends import torch_fused
from hf_asentmax.masks import query_positions, visible_keys

from calls import call_of, fused_softmax, masks_of
from reference import assert_close
from tiny_models import random_ids, tiny_model

BATCH, HEADS = 3, 4
WITHOUT_KEYS = torch.arange(150).expand(BATCH, 150) >= torch.tensor([[0], [70], [150]])

# name -> (q_len, kv_len, options)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "causal": (150, 150, {}),
    "full": (40, 150, {"is_causal": False}),
    "one query": (1, 150, {"alibi_slopes": True}),
    "last queries": (70, 150, {}),
    "last queries, alibi": (70, 150, {"alibi_slopes": True}),
    "alibi": (150, 150, {"alibi_slopes": True}),
    "alibi, full": (150, 150, {"alibi_slopes": True, "is_causal": False}),
    "left padding": (150, 150, {"attention_mask": WITHOUT_KEYS}),
    "left padding, alibi": (140, 150, {"attention_mask": WITHOUT_KEYS, "alibi_slopes": True}),
    "padding, full": (30, 150, {"attention_mask": WITHOUT_KEYS, "is_causal": False}),
    "right padding, full, alibi": (
        30,
        150,
        {"attention_mask": ~WITHOUT_KEYS, "alibi_slopes": True, "is_causal": False},
    ),
    "4D": (140, 150, {"attention_mask": 1, "is_causal": False}),
    "4D per head": (140, 150, {"attention_mask": HEADS, "alibi_slopes": True, "sliding_window": 80}),
    "4D for all": (140, 150, {"attention_mask": 1, "expanded": True, "alibi_slopes": True}),
    "4D per head for all": (150, 150, {"attention_mask": HEADS, "expanded": True, "alibi_slopes": True}),
    "packed": (150, 150, {"cu_seqlens": (0, 5, 5, 131, 150), "alibi_slopes": True, "batch": 1}),
    "window": (150, 150, {"sliding_window": 20}),
    "window, full": (145, 150, {"sliding_window": 20, "is_causal": False, "attention_mask": WITHOUT_KEYS}),
    "softcap": (150, 150, {"softcap": 2.0, "alibi_slopes": True, "scale": 0.7}),
    "longer": (300, 300, {"sliding_window": 150, "alibi_slopes": True}),
}


def case_of(name: str, kv_heads: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[torch.Tensor], Any, Any]:
    """The tensors [query, key, value], the gradient of the output, and the options of a case."""
    q_len, kv_len, options = CASES[name]
    options = dict(options)
    batch, expanded = options.pop("batch", BATCH), options.pop("expanded", False)
    generator = torch.Generator().manual_seed(7)
    shapes = ((batch, HEADS, q_len, 16), (batch, kv_heads, kv_len, 16), (batch, kv_heads, kv_len, 24))
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    grad = torch.randn(batch, HEADS, q_len, 24, generator=generator).to(device, dtype)
    if isinstance(options.get("attention_mask"), int):
        shape = (batch, options["attention_mask"], q_len, kv_len)
        options["attention_mask"] = torch.rand(shape, generator=generator) > 0.6
        options["attention_mask"][0, :, 3] = False
        options["attention_mask"][1, :, :, 20:] = False
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor([1.0, 0.5, 0.05, 0.0])
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32)
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    if expanded:
        moved["attention_mask"] = moved["attention_mask"][:1].expand(batch, -1, -1, -1)
    return tensors, grad, {"scale": 0.25, "is_causal": True, **moved}


def check(name: str, kv_heads: int, dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Check output and gradients of a case against the definition in float64, and exact zeros for rows without keys."""
    tensors, grad, options = case_of(name, kv_heads, dtype, device)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = entmax_attention(*exact, alpha=1.0, backend="eager", **options)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    output = fused_softmax(*tensors, **options)
    grads = torch.autograd.grad(output, tensors, grad)
    assert output.dtype == dtype
    assert_close("output", output, expected, tolerance)
    for which, actual, wanted in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True):
        assert_close(which, actual, wanted, 2 * tolerance)
    if options.get("attention_mask") is not None:
        nothing = (expected == 0).all(dim=-1)
        assert bool(nothing.any())
        assert bool((output[nothing] == 0).all()) and bool((grads[0][nothing] == 0).all())


def without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never use a bias: every call but plain attention and single queries goes to FlexAttention."""
    monkeypatch.setattr(torch_fused, "_SHORT_KV_LEN", 0)
    monkeypatch.setattr(torch_fused, "_FEW_QUERIES", 1)


@pytest.fixture
def flex_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`without_bias`, and gradients through FlexAttention's reference on the CPU."""
    without_bias(monkeypatch)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    torch._dynamo.reset()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [name for name in CASES if name != "softcap"])
def test_scaled_dot_product_attention(name: str, kv_heads: int) -> None:
    check(name, kv_heads, torch.float64, "cpu", 1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(name: str, flex_only: None) -> None:
    check(name, 2, torch.float64, "cpu", 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_blocks_cover_what_is_visible(name: str) -> None:
    """Blocks that are skipped show no key, and blocks that are computed without a mask show every key."""
    tensors, _, options = case_of(name, HEADS, torch.float32)
    q_len, kv_len = tensors[0].shape[2], tensors[1].shape[2]
    visible = visible_keys(query_positions(q_len, kv_len, "cpu"), kv_len, masks_of(**options))
    visible = torch.tensor(True) if visible is None else visible
    visible = visible.expand(*visible.shape[:-2] or (1, 1), q_len, kv_len)
    start, stop = torch_fused.key_interval(call_of(*tensors, alpha=1.0, **options))
    mask = torch_fused.mask_without_expanded_batch(options.get("attention_mask"))
    computed, full = torch_fused.block_masks(start, stop, kv_len, mask)
    visible = torch.nn.functional.pad(visible, (0, -kv_len % 128, 0, -q_len % 128))
    batch, heads, rows, columns = visible.shape
    tiles = visible.reshape(batch, heads, rows // 128, 128, columns // 128, 128).transpose(3, 4)
    assert computed.shape[2:] == full.shape[2:] == tiles.shape[2:4]
    assert not bool((tiles.any(5).any(4) & ~computed).any())
    assert not bool((full & ~tiles.all(5).all(4)).any())
    assert not bool((full & ~computed).any())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("causal", "full", "one query")])
def test_blocks_by_key_are_those_by_query(name: str, flex_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block lists of the backward pass equal those that PyTorch derives from the forward lists."""
    made: list[BlockMask] = []
    monkeypatch.setattr(torch_fused, "BlockMask", lambda *args, **kwargs: made.append(BlockMask(*args, **kwargs)))
    monkeypatch.setattr(torch_fused, "flex_attention", lambda query, *args, **kwargs: query)
    tensors, _, options = case_of(name, HEADS, torch.float32)
    fused_softmax(*tensors, **options)
    (ours,) = made
    lists = (ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices)
    theirs = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=128, seq_lengths=ours.seq_lengths)
    for count, index in (("q_num_blocks", "q_indices"), ("full_q_num_blocks", "full_q_indices")):
        assert torch.equal(getattr(ours, count), getattr(theirs, count))
        listed = torch.arange(getattr(ours, index).shape[-1]) < getattr(ours, count)[..., None]
        assert torch.equal(getattr(ours, index)[listed], getattr(theirs, index)[listed])


def test_autocast() -> None:
    tensors, _, options = case_of("left padding, alibi", 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_softmax(*tensors, **options)
    assert output.dtype == torch.bfloat16
    exact = [tensor.double() for tensor in tensors]
    assert_close("output", output, entmax_attention(*exact, alpha=1.0, backend="eager", **options), 1e-2)


@pytest.mark.parametrize(
    "name",
    [
        "left padding, alibi",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("4D per head", "4D per head for all", "packed")),
    ],
)
def test_flex_attention_is_compiled_without_a_graph_break(name: str, flex_only: None) -> None:
    tensors, grad, options = case_of(name, 2, torch.float32)
    compiled = torch.compile(fused_softmax, fullgraph=True, backend="aot_eager")
    output = compiled(*tensors, **options)
    expected = entmax_attention(*tensors, alpha=1.0, backend="eager", **options)
    assert_close("output", output, expected, 1e-5)
    grads = [torch.autograd.grad(result, tensors, grad) for result in (output, expected)]
    for actual, wanted in zip(*grads, strict=True):
        assert_close("gradient", actual, wanted, 1e-5)


def test_flex_attention_is_not_compiled_for_each_length(flex_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a growing cache: from the second length on, lengths are symbols of the compiled graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(torch_fused.flex_attention_on_intervals, backend=counter)
    monkeypatch.setattr(torch_fused, "flex_attention_on_intervals", compiled)
    for kv_len in (150, 260, 411, 530, 700):
        tensors = [torch.randn(2, 4, length, 16) for length in (70, kv_len, kv_len)]
        options = {"scale": 0.25, "is_causal": True, "alibi_slopes": torch.tensor([1.0, 0.5, 0.05, 0.0])}
        with torch.no_grad():
            output = fused_softmax(*tensors, **options)
        assert_close("output", output, entmax_attention(*tensors, alpha=1.0, backend="eager", **options), 1e-5)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("q_len", "kv_len", "batch", "mask", "kernel"),
    [
        (1024, 1024, 8, None, "sdpa_with_bias"),
        (1025, 1025, 1, None, "flex"),
        (64, 5000, 8, None, "sdpa_with_bias"),
        (65, 5000, 8, None, "flex"),
        (131, 131, 1024, "for each", "flex"),
        (131, 131, 1024, "for all", "sdpa_with_bias"),
    ],
)
def test_which_kernel(q_len: int, kv_len: int, batch: int, mask: str | None, kernel: str) -> None:
    """A bias is used where it is small: short rows, few queries, one mask for all samples."""
    query, key = (torch.empty(batch, 16, length, 16, device="meta") for length in (q_len, kv_len))
    given = None if mask is None else torch.empty(batch, 16, q_len, kv_len, dtype=torch.bool, device="meta")
    if given is not None and mask == "for all":
        given = given[:1].expand(batch, -1, -1, -1)
    slopes = torch.empty(16, device="meta")
    call = call_of(query, key, key, alpha=1.0, attention_mask=given, alibi_slopes=slopes)
    assert torch_fused.kernel_for(torch_fused.prepared(call)) == kernel


def test_unsupported_calls() -> None:
    tensors, _, _ = case_of("causal", 2, torch.float32)
    with pytest.raises(NotImplementedError, match="CUDA GPU"):
        entmax_attention(*tensors, alpha=1.0, backend="torch")
    with pytest.raises(NotImplementedError, match="alpha = 1"):
        entmax_attention(*tensors, alpha=1.5, backend="torch")


def softmax_model(**flags: Any) -> PreTrainedModel:
    flags = {"alpha": 1.0, "scaling": "none", "positions": "nape", **flags}
    return tiny_model("llama", "asentmax", flags, head_dim=16, num_hidden_layers=1)


def results_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of the tokens that are not padding, and all gradients of their loss in one vector."""
    logits = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    loss = torch.nn.functional.cross_entropy(logits.double(), ids[mask.bool()])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach(), torch.cat([grad.double().flatten() for grad in grads])


@pytest.mark.parametrize(
    ("scaling", "compiled"), [("none", False), pytest.param("ssmax", True, marks=pytest.mark.slow)]
)
def test_models_use_this_backend(scaling: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, and without a graph break."""
    ids, mask = random_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    model = softmax_model(scaling=scaling)
    expected = results_of(model, ids, mask)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return attention(*args, **kwargs)

    attention = torch_fused.attention
    monkeypatch.setattr("hf_asentmax.attention._fastest", lambda call: "torch")
    monkeypatch.setattr(torch_fused, "unsupported_reason", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch_fused, "attention", counted)
    torch._dynamo.reset()
    actual = results_of(torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model, ids, mask)
    assert len(calls) == 1
    for result, wanted in zip(actual, expected, strict=True):
        assert_close("logits or gradients", result, wanted, 1e-5)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["sdpa_with_bias", "flex"])
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel == "flex":
        without_bias(monkeypatch)
    torch._dynamo.reset()
    check(name, 2, torch.bfloat16, "cuda", 8e-3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kernel", ["sdpa_with_bias", "flex"])
@pytest.mark.parametrize("name", ["left padding, alibi", "4D per head", "4D for all", "4D per head for all", "packed"])
def test_compiled_on_a_gpu(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that FlexAttention's functions read are made in the same compiled graph."""
    if kernel == "flex":
        without_bias(monkeypatch)
    torch._dynamo.reset()
    monkeypatch.setattr("test_torch_fused.fused_softmax", torch.compile(fused_softmax, fullgraph=True))
    check(name, 2, torch.bfloat16, "cuda", 8e-3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(240, 25, 3865), (240, 70, 3910), (1024, 131, 131)])
@pytest.mark.parametrize("compiled", [False, True])
def test_large_batches_on_a_gpu(batch: int, q_len: int, kv_len: int, compiled: bool) -> None:
    """Few queries with many cached keys, and short rows with one mask each. Three rows are checked."""
    torch._dynamo.reset()
    generator = torch.Generator("cuda").manual_seed(5)
    shapes = ((batch, 16, length, 32) for length in (q_len, kv_len, kv_len))
    query, key, value = (torch.randn(s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in shapes)
    slopes = torch.tensor([0.5**head if head < 8 else 0.0 for head in range(16)], device="cuda")
    options: dict[str, Any] = {"scale": 0.2, "is_causal": True, "alibi_slopes": slopes}
    mask = None
    if q_len == kv_len:
        mask = torch.rand(batch, 16, q_len, kv_len, device="cuda", generator=generator) > 0.3

    def of(rows: slice) -> tuple[list[torch.Tensor], dict[str, Any]]:
        given = [tensor[rows] for tensor in (query, key, value)]
        return given, {**options, "attention_mask": None if mask is None else mask[rows]}

    attend = torch.compile(fused_softmax) if compiled else fused_softmax
    with torch.no_grad():
        for rows in (slice(0, batch // 8), slice(None)):  # a second batch size makes it a symbol of the graph
            tensors, given = of(rows)
            output = attend(*tensors, **given)
        for row in (0, batch // 2, batch - 1):
            one = slice(row, row + 1)
            tensors, given = of(one)
            exact = [tensor.double() for tensor in tensors]
            wanted = entmax_attention(*exact, alpha=1.0, backend="eager", **given)
            assert_close("output", output[one], wanted, 8e-3)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("length", [91, 1500])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_a_gpu(length: int, compiled: bool) -> None:
    """Logits and gradients in bf16 against float64 eager attention."""
    torch._dynamo.reset()
    ids = random_ids(2, length).cuda()
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    expected = results_of(softmax_model().double().cuda(), ids, mask)
    model = softmax_model().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = results_of(torch.compile(model, fullgraph=True) if compiled else model, ids, mask)
    for result, wanted in zip(actual, expected, strict=True):
        assert_close("logits or gradients", result, wanted, 3e-2)


@pytest.mark.parametrize("shape", [(1, 1, 60, 70), (3, 1, 1, 70), (1, HEADS, 1, 70)])
@pytest.mark.parametrize("flex", [False, True], ids=["bias", "flex"])
def test_4d_masks_broadcast(shape: tuple[int, ...], flex: bool, request: pytest.FixtureRequest) -> None:
    if flex:
        request.getfixturevalue("flex_only")
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < 0.5
    query, key, value = (torch.randn(BATCH, HEADS, length, 16, generator=generator) for length in (60, 70, 70))
    output = fused_softmax(query, key, value, attention_mask=mask)
    full = mask.expand(BATCH, shape[1], 60, 70).contiguous()
    expected = entmax_attention(query, key, value, alpha=1.0, attention_mask=full, backend="eager")
    assert_close("output", output, expected, 1e-5)
