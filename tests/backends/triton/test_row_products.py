"""The products of rows that a length scaling's gradient is made of: against float64, and in compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from hf_asentmax.backends.triton import row_products
from hf_asentmax.backends.triton.common import launching
from hf_asentmax.scaling.query import scaled_query

from reference import assert_close

pytestmark = pytest.mark.gpu  # too: they run where there is none as well


@pytest.fixture
def products(device: str) -> Any:
    """The operator on a GPU (the third time that it is called: conftest); else its kernel in the interpreter."""
    if device == "cuda":
        return row_products.row_products
    from hf_asentmax.backends.triton.row_products_kernel import launch

    return lambda a, b: launch(launching.Launcher(torch.device(device)), a, b)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["float32", "bfloat16", "mixed"],
)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 91, 32), (1, 1, 1, 16), (2, 2, 64, 80), (1, 2, 130, 7), (0, 2, 5, 8)],
    ids=lambda shape: " x ".join(map(str, shape)),
)
def test_products_equal_float64(products: Any, shape: tuple[int, ...], dtypes: Any, device: str) -> None:
    batch, heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtypes[0]).transpose(1, 2)
    b = torch.randn(*shape[:3], 2 * head_dim, generator=generator).to(device, dtypes[1])[..., :head_dim]
    expected = (a.double() * b.double()).sum(-1)
    actual = products(a, b)
    assert actual.dtype == torch.float32 and actual.is_contiguous() and actual.shape == shape[:3]
    if actual.numel():
        assert_close("products", actual, expected, 1e-6)
        assert_close("operator", row_products.row_products(a, b), expected, 1e-6)


def test_without_triton_and_in_float64_the_sum_is_plain(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    a, b = (torch.randn(2, 3, 5, 8, device=device) for _ in range(2))
    monkeypatch.setattr(row_products, "run", None)  # would launch
    assert row_products._on_gpu(a.double(), b).dtype == torch.float64
    monkeypatch.setattr(row_products, "unsupported_device_reason", lambda device: "Triton is not installed")
    assert torch.equal(row_products._on_gpu(a, b), (a * b).sum(-1))


def test_the_operators_pass_opcheck(device: str) -> None:
    query = torch.randn(2, 3, 20, 16, device=device).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for batch in (1, 2):
        factor = torch.rand(batch, 3, 20, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.hf_asentmax.scale_rows.default, (query, factor))
    torch.library.opcheck(torch.ops.hf_asentmax.row_products.default, (query.detach(), query.detach()))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("unscaled", [0, 2])
def test_compiled_factors_get_their_gradient_from_the_operator(batch: int, unscaled: int, device: str) -> None:
    """Whatever strides torch.compile pads: it has no sum over head_dim to write itself."""
    query = torch.randn(2, 3, 20, 16, device=device, requires_grad=True)
    factor = torch.rand(batch, 3 - unscaled, 20, device=device, requires_grad=True)
    grad = torch.randn_like(query)
    backward: list[str] = []

    def seen(graph: torch.fx.GraphModule, _: Any) -> Any:
        backward.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        scaled_query,
        backend=aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=seen),
    )
    expected = torch.autograd.grad(scaled_query(query, factor, unscaled), (query, factor), grad)
    actual = torch.autograd.grad(compiled(query, factor, unscaled), (query, factor), grad)
    for name, one, other in zip(("query", "factor"), actual, expected, strict=True):
        assert_close(name, one, other, 1e-6)
    assert backward.count("hf_asentmax.row_products.default") == 1
    assert [name for name in backward if "sum" in name] == ["aten.sum.dim_IntList"] * (batch == 1)  # over the batch
