"""How large a model's scores can be, head by head, and what brings them down to where keys compete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_asentmax.integration.install import scaling_of
from recipes.synthetic.measuring import autocast
from recipes.synthetic.models import outputs_at
from recipes.synthetic.tasks import Batch

__all__ = ["score_sizes", "size_factors"]


@torch.no_grad()
def score_sizes(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    r"""(layers, heads) sizes of the scores, rms_i(f_i |q_i|) rms_j(|k_j|) / sqrt(head_dim), f the length scaling.

    A query and a key of average length that point the same way have this score. Runs the model once on the batch.
    """
    was_training = model.training
    model.eval()
    with _recorded(model) as records, autocast(batch.inputs.device):
        outputs_at(model, batch)
    model.train(was_training)
    head_dim = model.config.head_dim
    sizes = []
    for record in records:
        lengths = {name: record[name].float().unflatten(-1, (-1, head_dim)).norm(dim=-1) for name in ("query", "key")}
        if "factor" in record:  # of the heads that are scaled, the last ones
            factor = record["factor"].transpose(1, 2)
            lengths["query"][..., -factor.shape[-1] :] *= factor
        query, key = (lengths[name].square().mean(dim=(0, 1)).sqrt() for name in ("query", "key"))
        sizes.append(query * key / head_dim**0.5)
    return torch.stack(sizes)


def size_factors(
    sizes: torch.Tensor, uniform: torch.Tensor, low: float, high: float, strength: float = 1.0
) -> torch.Tensor:
    """(layers, samples, heads) factors, at most 1, that bring scores to a size drawn between low and high.

    Args:
        sizes: (layers, heads), from `score_sizes`.
        uniform: (samples,) in [0, 1); a sample's size is low (high / low)^uniform, in all layers and heads. Heads whose
            scores are smaller stay as they are.
        strength: 0 for no change to 1 for all of it, in the logarithm.
    """
    wanted = low * (high / low) ** uniform
    return (wanted[None, :, None] / sizes[:, None, :]).clamp(max=1.0).pow(strength)


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What each layer's query and key projections and its length scaling give while the context is open."""
    records: list[dict[str, torch.Tensor]] = []
    handles = []
    for layer in model.model.layers:
        records.append({})
        attention = layer.self_attn
        modules: dict[str, nn.Module | None] = {
            "query": attention.q_proj,
            "key": attention.k_proj,
            "factor": scaling_of(attention),
        }
        for name, module in modules.items():
            if module is not None:

                def record(
                    module: nn.Module,
                    inputs: tuple[torch.Tensor, ...],
                    output: torch.Tensor,
                    into: dict[str, torch.Tensor] = records[-1],
                    name: str = name,
                ) -> None:
                    into[name] = output

                handles.append(module.register_forward_hook(record))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
