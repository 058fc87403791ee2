"""The choice of a backend: which one "auto" tries, when eager replaces it, and the warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hf_asentmax import attention, entmax_attention
from hf_asentmax.backends import torch_fused
from hf_asentmax.positions import alibi_slopes

from calls import call_of

TENSORS = torch.randn(3, 1, 2, 5, 16, generator=torch.Generator().manual_seed(0)).unbind()


class OnGpu:
    """A call that reports a CUDA device, for a question that needs no GPU."""

    def __init__(self, call: Any) -> None:
        self.scoring = call.scoring
        self.query = type("Query", (), {"device": torch.device("cuda")})


@pytest.mark.parametrize(("alpha", "expected"), [(1.0, "torch"), (1.001, "triton"), (1.5, "triton"), (2.0, "triton")])
def test_auto_tries_a_fused_backend_on_a_gpu_only(alpha: float, expected: str) -> None:
    call = call_of(*TENSORS, alpha=alpha)
    assert attention._fastest(call) == "eager"
    assert attention._fastest(OnGpu(call)) == expected  # type: ignore[arg-type]


def test_auto_falls_back_to_eager_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_fastest", lambda call: "torch")
    monkeypatch.setattr(attention, "_already_warned", set())
    with pytest.warns(UserWarning, match="runs this attention in plain PyTorch .*: PyTorch's attention is softmax"):
        output = entmax_attention(*TENSORS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(entmax_attention(*TENSORS), output)
    assert torch.equal(entmax_attention(*TENSORS, backend="eager"), output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "softmax (alpha = 1), got 1.5"),
        ({"alpha": 1.0}, "need a CUDA GPU here, the tensors are on cpu"),
        ({"alpha": 1.0, "mapping": torch.softmax}, "alpha-entmax"),
    ],
)
def test_the_fused_backend_says_why_it_cannot_run_a_call(options: dict[str, Any], message: str) -> None:
    reason = torch_fused.unsupported_reason(call_of(*TENSORS, **options))
    assert reason is not None and message in reason


def test_slopes_of_an_unknown_kind_or_of_too_many_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be 'harmonic' or 'geometric', got 'linear'"):
        alibi_slopes(4, 2, "linear")
    with pytest.raises(ValueError, match="between 0 and the 4 heads, got 5"):
        alibi_slopes(4, 5, "harmonic")
