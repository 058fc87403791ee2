"""How large a model's scores are, head by head, and limits to scores and logits that keep a model learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_asentmax.integration.install import scaling_of
from recipes.synthetic.measuring import autocast
from recipes.synthetic.models import outputs_at
from recipes.synthetic.tasks import Batch

__all__ = ["limit_logits", "limit_scores", "score_sizes"]


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


@torch.no_grad()
def limit_scores(model: PreTrainedModel, sizes: torch.Tensor, limit: float, alibi_heads: int = 0) -> None:
    """Scale down the query and key projections of heads whose `sizes` exceed the limit, each by the square root.

    The first `alibi_heads` stay as they are: their scores are measured against their slopes.

    QK-Clip (Kimi K2, 2025), here by the scores' size in place of their maximum. It changes weights, not the model: what
    is tested is what was trained. Without it lookup scores grow to hundreds and thousands, where entmax is an argmax:
    a row whose weight lies on one key alone has no gradient, right or wrong, and errors stay.
    """
    head_dim = model.config.head_dim
    for layer, of_layer in zip(model.model.layers, sizes, strict=True):
        factor = (limit / of_layer).clamp(max=1.0).sqrt()
        factor[:alibi_heads] = 1.0
        factor = factor.repeat_interleave(head_dim)[:, None]
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.mul_(factor)


@torch.no_grad()
def limit_logits(model: PreTrainedModel, batch: Batch, limit: float) -> torch.Tensor:
    """Scale down the output layer where logits stand out by more than the limit; () how much they did before.

    That is the mean over the batch's targets of the largest logit less the mean one. Heads that look up the same
    outvote each other's errors, and with large logits their bare majority makes a loss of nothing: see lookup.py.
    """
    was_training = model.training
    model.eval()
    with autocast(batch.inputs.device):
        logits = outputs_at(model, batch)[batch.labels >= 0].float()
    model.train(was_training)
    gap = (logits.amax(dim=-1) - logits.mean(dim=-1)).mean()
    model.get_output_embeddings().weight.mul_((limit / gap).clamp(max=1.0))
    return gap


def _record(
    into: dict[str, torch.Tensor], name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> None:
    into[name] = output


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[dict[str, torch.Tensor]]]:
    """What each layer's query and key projections and its length scaling give while the context is open."""
    records: list[dict[str, torch.Tensor]] = []
    handles = []
    for attention in (layer.self_attn for layer in model.model.layers):
        records.append({})
        modules = {"query": attention.q_proj, "key": attention.k_proj, "factor": scaling_of(attention)}
        for name, module in modules.items():
            if module is not None:
                handles.append(module.register_forward_hook(partial(_record, records[-1], name)))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
