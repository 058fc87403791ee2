"""The kernels as a PyTorch operator: compiled graphs, CUDA graphs, zeros, and which calls are refused."""

from __future__ import annotations

import pytest
import torch

from hf_asentmax import entmax_attention
from hf_asentmax.backends.triton import entry

from calls import call_of
from kernel_cases import Case, options, tensors
from reference import assert_close

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

REGIMES = [
    Case("head", q_len=40),
    Case("short", q_len=150, head_dim=16, dtype=torch.float16),
    Case("dense", q_len=140, heads=1),
]


def attend(case: Case, device: str, **more: object) -> list[torch.Tensor]:
    *inputs, grad = tensors(case, device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = entmax_attention(*leaves, backend="triton", **options(case, device), **more)
    return [output, *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("kind", ["random", "sharp", "near-uniform", "one"])
@pytest.mark.parametrize("length", [40, 140])
def test_zeros_are_where_the_definition_has_them(length: int, kind: str, device: str) -> None:
    """With the identity as values, the output is the weights. Only weights within rounding of zero may differ."""
    if device == "cpu" and length == 140 and kind in ("sharp", "one"):
        pytest.skip("slow in the interpreter")
    query, key, _, _ = tensors(Case("zeros", heads=1, q_len=length, kind=kind), device)
    value = torch.eye(length, device=device).expand(1, 1, -1, -1)
    weights = entmax_attention(query, key, value, backend="triton")
    expected = entmax_attention(query.double(), key.double(), value.double(), backend="eager")
    assert torch.all(expected[weights == 0] < 1e-8)
    assert torch.all(weights[expected == 0] < 1e-8)
    assert (expected == 0).any() or kind == "near-uniform"
    assert_close("sums", weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-5)


@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_rows_without_keys_give_zeros(case: Case, device: str) -> None:
    query, key, value, grad = tensors(case, device)
    mask = torch.ones(1, case.q_len, dtype=torch.bool, device=device)
    mask[:, :30] = False
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = entmax_attention(*leaves, backend="triton", attention_mask=mask)
    dq, dk, dv = torch.autograd.grad(output, leaves, grad)
    assert not output[:, :, :30].any() and output[:, :, 30:].any()
    assert not dq[:, :, :30].any() and not dk[:, :, :30].any() and not dv[:, :, :30].any()


@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_inputs_that_are_no_numbers_show_in_the_output(case: Case, device: str) -> None:
    query, key, value, _ = tensors(case, device)
    bad_query = query.clone()
    bad_query[:, :, 20, 3] = float("nan")
    output = entmax_attention(bad_query, key, value, backend="triton")
    assert (
        output[:, :, 20].isnan().all() and not output[:, :, :20].isnan().any() and not output[:, :, 21:].isnan().any()
    )
    bad_key = key.clone()
    bad_key[:, :, 20, 3] = float("inf")
    output = entmax_attention(query, bad_key, value, backend="triton")
    assert not output[:, :, :20].isnan().any()
    above = (query[:, :, 20:, 3] > 0)[..., None].expand_as(output[:, :, 20:])
    assert output[:, :, 20:][above].isnan().all()


@pytest.mark.parametrize("for_backward", [True, False])
def test_the_operator_passes_opcheck(for_backward: bool, device: str) -> None:
    import hf_asentmax.backends.triton.operators  # noqa: F401  (defines it)

    query, key, value, _ = tensors(Case("op", q_len=20, heads=1, head_dim=16), device)
    leaves = [tensor.requires_grad_(for_backward) for tensor in (query, key, value)]
    settings = (1.5, 0.25, True, None, None, for_backward)
    operator = torch.ops.hf_asentmax.entmax_attention.default
    torch.library.opcheck(operator, (*leaves, None, None, None, None, None, None, *settings))


def test_the_output_may_be_changed_in_place(device: str) -> None:
    *inputs, grad = tensors(Case("in place", q_len=20, head_dim=16), device)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    doubled = entmax_attention(*leaves, backend="triton").mul_(2.0)
    plain = entmax_attention(*leaves, backend="triton") * 2.0
    for first, second in zip(*(torch.autograd.grad(out, leaves, grad) for out in (doubled, plain)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.name)
def test_without_gradients_the_output_is_the_same(case: Case, device: str) -> None:
    query, key, value, _ = tensors(case, device)
    with_state = entmax_attention(query.requires_grad_(), key, value, backend="triton")
    with torch.no_grad():
        assert_close("output", entmax_attention(query, key, value, backend="triton"), with_state, 2e-3)


def test_compiles_to_one_graph(device: str) -> None:
    case = Case("compiled", q_len=40, batch=2, mask="left", alibi=True)
    *inputs, _ = tensors(case, device)
    settings = options(case, device)
    compiled = torch.compile(
        lambda *args: entmax_attention(*args, backend="triton", **settings),
        fullgraph=True,
        backend="inductor" if device == "cuda" else "aot_eager",
    )
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output = compiled(*leaves)
    grads = torch.autograd.grad(output.square().sum(), leaves)
    plain = entmax_attention(*leaves, backend="triton", **settings)
    plain_grads = torch.autograd.grad(plain.square().sum(), leaves)
    for name, mine, expected in zip("oqkv", (output, *grads), (plain, *plain_grads), strict=True):
        assert_close(name, mine, expected, 1e-6)


def test_one_compiled_graph_serves_many_lengths(device: str) -> None:
    torch.compiler.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda *args: entmax_attention(*args, backend="triton"), fullgraph=True, dynamic=True, backend=counting
    )
    for length in (140, 150, 190):
        query, key, value, _ = tensors(Case("lengths", q_len=length, heads=2, head_dim=16, dtype=torch.float16), device)
        assert_close("output", compiled(query, key, value), entmax_attention(query, key, value, backend="triton"), 1e-3)
    assert len(graphs) == 1


@pytest.mark.parametrize("window", [2**31 - 1, 2**40])
def test_a_window_wider_than_32_bits_count_hides_nothing(window: int, device: str) -> None:
    query, key, value, _ = tensors(Case("window", q_len=40, head_dim=16), device)
    expected = entmax_attention(query, key, value, backend="triton")
    assert_close("output", entmax_attention(query, key, value, backend="triton", sliding_window=window), expected, 1e-6)


def test_a_mask_of_more_than_2_to_31_elements(device: str) -> None:
    """Only the pages of the storage that hold the heads' masks are ever touched."""
    case = Case("large", q_len=4, kv_len=20, heads=3, head_dim=16, causal=False, mask="free_heads")
    query, key, value, _ = tensors(case, device)
    mask = options(case, device)["attention_mask"]
    large = torch.empty(2**31 + 80, dtype=torch.bool, device=device).as_strided((1, 3, 4, 20), (1, 2**30, 20, 1))
    large.copy_(mask)
    expected = entmax_attention(query, key, value, backend="eager", is_causal=False, attention_mask=mask)
    actual = entmax_attention(query, key, value, backend="triton", is_causal=False, attention_mask=large)
    assert_close("output", actual, expected, 1e-5)


def test_autocast_takes_its_type(device: str) -> None:
    query, key, value, _ = tensors(Case("autocast", q_len=20, head_dim=16), device)
    with torch.autocast(device, dtype=torch.float16):
        output = entmax_attention(query, key, value, backend="triton")
    assert output.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"alpha": 1.0}, "softmax"),
        ({"alpha": 1.01}, "alpha from"),
        ({"head_dim": 300}, "head dimensions up to"),
        ({"slopes": True}, "constants"),
    ],
)
def test_what_is_unsupported_is_said(change: dict[str, object], message: str, device: str) -> None:
    dtype, head_dim = change.get("dtype", torch.float32), change.get("head_dim", 16)
    query = torch.randn(1, 2, 4, head_dim, device=device, dtype=dtype)  # type: ignore[call-overload]
    slopes = torch.ones(2, device=device, requires_grad=True) if change.get("slopes") else None
    alpha = change.get("alpha", 1.5)
    reason = entry.unsupported_reason(call_of(query, query, query, alpha=alpha, alibi_slopes=slopes))
    assert reason is not None and message in reason
    with pytest.raises(NotImplementedError, match=message):
        entmax_attention(query, query, query, alpha=alpha, alibi_slopes=slopes, backend="triton")  # type: ignore[arg-type]


@pytest.mark.parametrize("weighted", [False, True])
def test_second_gradients_are_refused(weighted: bool, device: str) -> None:
    """Also where the output's gradient is a constant, which would leave the gradient without a graph."""
    leaves = [torch.randn(1, 2, 20, 16, device=device).requires_grad_() for _ in range(3)]
    output = entmax_attention(*leaves, backend="triton")
    loss = output.square().sum() if weighted else output.sum()
    with pytest.raises(NotImplementedError, match="backend='eager'"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("length", [100, 250, 3000, 9000])
def test_runs_in_a_cuda_graph_without_waiting_for_the_host(length: int) -> None:
    case = Case("graph", q_len=length, head_dim=64, dtype=torch.bfloat16, alibi=True)
    *inputs, grad = tensors(case, "cuda")
    settings = options(case, "cuda")

    def step() -> list[torch.Tensor]:
        # new leaves: autograd ties a leaf to the stream of its first use
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        output = entmax_attention(*leaves, backend="triton", **settings)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            step()
            expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for mine, plain in zip(captured, expected, strict=True):
        assert_close("replayed", mine, plain, 1e-2)


@pytest.mark.gpu
@on_gpu
def test_memory_grows_linearly() -> None:
    def peak(length: int) -> int:
        query, key, value, grad = tensors(Case("memory", q_len=length, head_dim=64, dtype=torch.bfloat16), "cuda")
        leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(entmax_attention(*leaves, backend="triton"), leaves, grad)
        return torch.cuda.max_memory_allocated() - before

    assert peak(32768) < 2.5 * peak(16384)
