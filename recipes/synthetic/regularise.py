"""What is done to the inputs and scores in training only: corrupted answers, jittered scores, hard examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.synthetic.tasks import Batch, Task

__all__ = ["ScoreJitter", "corrupted_answers", "hardest"]


def corrupted_answers(batch: Batch, task: Task, probability: float, generator: torch.Generator) -> Batch:
    """Answer tokens as inputs replaced by random letters; the labels stay.

    A model then can't find the rest of an answer by what it was given of it (in MQMTAR: look up where the value's
    first letter stood), and has to go back to the question.
    """
    if probability == 0:
        return batch
    inputs = batch.inputs.clone()
    answer = inputs[:, batch.answer_letters]
    noise = torch.randint(task.FIRST_LETTER, task.data_tokens, answer.shape, generator=generator, device=answer.device)
    chosen = torch.rand(answer.shape, generator=generator, device=answer.device) < probability
    inputs[:, batch.answer_letters] = torch.where(chosen, noise, answer)
    return replace(batch, inputs=inputs)


class ScoreJitter:
    """Random factors for each sample on the scores of all heads without ALiBi, in training.

    A score is a sum over channels, q_c k_c, and all of it is multiplied by a factor in [low, 1], and each channel's
    part left out with probability `drop`, the same ones for all rows of a sample. Right keys then have to win by much,
    and by many channels. Scores are linear in the query, so this is done to what each layer's query projection gives:
    one place for every method, whatever its length scaling.

    Args:
        model: a model of this recipe.
        low: the smallest factor, above 0; 1 for none.
        alibi_heads: how many heads, from the first, are left alone.
        drop: probability with which a channel is left out; 0 for none.
    """

    def __init__(self, model: PreTrainedModel, low: float, alibi_heads: int, drop: float = 0.0) -> None:
        if not 0 < low <= 1:
            raise ValueError(f"the smallest factor must lie above 0 and be at most 1, got {low}")
        if not 0 <= drop < 1:
            raise ValueError(f"the probability of leaving a channel out must be at least 0 and below 1, got {drop}")
        self.low, self.drop = low, drop
        width = model.config.num_attention_heads * model.config.head_dim
        self._unscaled = alibi_heads * model.config.head_dim
        self._channels = width - self._unscaled
        self._factor: torch.Tensor | None = None
        if low < 1 or drop > 0:
            for layer in model.model.layers:
                layer.self_attn.q_proj.register_forward_hook(self._scale)

    def draw(self, size: int, generator: torch.Generator) -> None:
        """New factors for the next batch of `size` samples."""
        uniform = torch.rand((size, 1, 1), generator=generator, device=generator.device)
        self._factor = self.low + (1 - self.low) * uniform
        if self.drop > 0:
            kept = torch.rand((size, 1, self._channels), generator=generator, device=generator.device) >= self.drop
            self._factor = self._factor * kept

    def lowest(self, size: int, device: torch.device) -> None:
        """The smallest factor for each of `size` samples: the hardest view of them."""
        self._factor = torch.full((size, 1, 1), self.low, device=device)

    def _scale(
        self, projection: nn.Module, inputs: tuple[torch.Tensor, ...], query: torch.Tensor
    ) -> torch.Tensor | None:
        if not projection.training or self._factor is None:
            return None
        scaled = (query[..., self._unscaled :] * self._factor).to(query.dtype)
        return torch.cat([query[..., : self._unscaled], scaled], dim=-1)


@torch.no_grad()
def hardest(batch: Batch, keep: int, sample_losses: Callable[[Batch], torch.Tensor]) -> Batch:
    """The `keep` samples of largest loss, of a multiple of `keep` samples.

    Args:
        batch: the candidates.
        keep: how many stay.
        sample_losses: gives (keep,) losses of `keep` samples.
    """
    parts = [sample_losses(batch.select(slice(start, start + keep))) for start in range(0, len(batch), keep)]
    return batch.select(torch.cat(parts).topk(keep).indices)
