"""Changes made in training only: corrupted answers, scaled scores, noise on keys, omitted heads, a window for ALiBi."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.synthetic.tasks import Batch, Task

__all__ = ["AlibiWindow", "HeadDrop", "ScoreJitter", "corrupted_answers"]


def corrupted_answers(batch: Batch, task: Task, probability: float, generator: torch.Generator) -> Batch:
    """The batch with answer tokens, as inputs, replaced by random letters with this probability. Labels stay.

    The model then cannot find the rest of an answer from the part that it was given. In MQMTAR it could otherwise look
    up where the value's first letter stands in the source; with corruption it has to use the key that is asked for.
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
    """Random changes of the scores q k of all heads without ALiBi in training. The right key has to win by a margin.

    All scores of a sample are multiplied by one factor in [low, 1], and each key gets normal noise of `noise` times its
    root mean square. Scores are linear in queries and keys, so hooks change what each layer's projections return. This
    works for every method, whatever its length scaling.

    Args:
        model: a model of this recipe.
        low: the smallest factor, above 0; 1 for no scaling.
        alibi_heads: how many heads, from the first, have ALiBi and stay unchanged. With noise on some heads only, a
            model may look up by the others; heads with ALiBi do not see far, so noise must not be too strong.
        noise: size of the noise on keys; 0 for none.
        log_uniform: whether the logarithm of the factor is uniform instead of the factor. With a small `low`, scores of
            any size then shrink to where several keys have a weight. A row with all its weight on one key has no
            gradient, right or wrong.

    Raises:
        ValueError: `low` is not in (0, 1], or `noise` is negative.
    """

    def __init__(
        self, model: PreTrainedModel, low: float, alibi_heads: int, noise: float = 0.0, log_uniform: bool = False
    ) -> None:
        if not 0 < low <= 1:
            raise ValueError(f"jitter is the smallest factor: above 0 and at most 1, got {low}")
        if noise < 0:
            raise ValueError(f"the size of the keys' noise must be at least 0, got {noise}")
        self.low, self.noise, self.log_uniform = low, noise, log_uniform
        self._head_dim = model.config.head_dim
        self._unchanged = alibi_heads * self._head_dim
        self._noisy_channels = model.config.num_attention_heads * self._head_dim - self._unchanged
        self._factor: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        for layer in model.model.layers:
            if low < 1:
                layer.self_attn.q_proj.register_forward_hook(self._scaled)
            if noise > 0:
                layer.self_attn.k_proj.register_forward_hook(self._noisy)

    @property
    def factor(self) -> torch.Tensor | None:
        """(samples, 1, 1): the factors of the next batch, or None before the first draw."""
        return self._factor

    def draw(self, size: int, length: int, generator: torch.Generator, strength: float = 1.0) -> None:
        """Draws the factors and the noise of the next batch.

        Args:
            size: samples in the batch.
            length: positions in a sample.
            generator: on the model's device.
            strength: how much of the change is applied, from 0 (none) to 1.
        """
        device = generator.device
        uniform = torch.rand((size, 1, 1), generator=generator, device=device)
        if self.log_uniform:
            self._factor = self.low ** (strength * uniform)
        else:
            self._factor = 1 - strength * (1 - self.low) * uniform
        if self.noise > 0:
            noise = torch.randn((size, length, self._noisy_channels), generator=generator, device=device)
            self._added = noise.mul_(strength * self.noise)

    def lowest(self, size: int, device: torch.device) -> None:
        """Sets the smallest factor for each of `size` samples, and no noise: all samples are then judged alike."""
        self._factor = torch.full((size, 1, 1), self.low, device=device)
        self._added = None

    def off(self) -> None:
        """Removes the changes until the next draw."""
        self._factor = self._added = None

    def _scaled(
        self, projection: nn.Module, inputs: tuple[torch.Tensor, ...], query: torch.Tensor
    ) -> torch.Tensor | None:
        if not projection.training or self._factor is None:
            return None
        changed = (query[..., self._unchanged :] * self._factor).to(query.dtype)
        return torch.cat([query[..., : self._unchanged], changed], dim=-1)

    def _noisy(self, projection: nn.Module, inputs: tuple[torch.Tensor, ...], key: torch.Tensor) -> torch.Tensor | None:
        if not projection.training or self._added is None:
            return None
        free = key[..., self._unchanged :]
        heads = free.unflatten(-1, (-1, self._head_dim))
        size = heads.detach().square().mean(-1, keepdim=True).sqrt().expand_as(heads).flatten(-2)
        return torch.cat([key[..., : self._unchanged], (free + size * self._added).to(key.dtype)], dim=-1)


class HeadDrop:
    """Leaves out heads without ALiBi in training, so that each of them has to be right alone.

    A sample keeps at least one of a layer's heads, and the heads that stay are scaled up to the sum of all. Heads that
    look up the same key outvote each other's errors. Once their majority is right, the loss says nothing about the
    others; and what is wrong in a few heads at a training length is wrong in most heads among a thousand times as many
    keys.

    Args:
        model: a model of this recipe.
        probability: with which each head is left out, except the one that stays.
        alibi_heads: how many heads, from the first, have ALiBi and always stay.

    Raises:
        ValueError: the probability is not in [0, 1).
    """

    def __init__(self, model: PreTrainedModel, probability: float, alibi_heads: int) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"head-drop is a probability: at least 0 and below 1, got {probability}")
        self.probability = probability
        self._layers = len(model.model.layers)
        self._heads, self._always = model.config.num_attention_heads - alibi_heads, alibi_heads
        self._head_dim = model.config.head_dim
        self.factors: list[torch.Tensor] | None = None  # for each layer, (samples, 1, channels)
        if probability > 0 and self._heads > 0:
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.o_proj.register_forward_pre_hook(partial(self._kept, index))

    def draw(self, size: int, generator: torch.Generator, strength: float = 1.0) -> None:
        """Draws the heads that each of the next `size` samples keeps; the probability is multiplied by `strength`."""
        if self.probability == 0 or self._heads == 0:
            return
        device = generator.device
        shape = (self._layers, size, self._heads)
        kept = torch.rand(shape, generator=generator, device=device) >= strength * self.probability
        one = torch.randint(self._heads, (*shape[:2], 1), generator=generator, device=device)
        kept = kept.scatter(2, one, True)
        factor = kept * (self._heads / kept.sum(dim=2, keepdim=True))
        factor = torch.cat([factor.new_ones((*shape[:2], self._always)), factor], dim=2)
        self.factors = list(factor.repeat_interleave(self._head_dim, dim=2)[:, :, None].unbind())

    def _kept(
        self, layer: int, projection: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if not projection.training or self.factors is None:
            return None
        return ((inputs[0] * self.factors[layer]).to(inputs[0].dtype),)


class AlibiWindow:
    """Limits heads with ALiBi to the last tokens in half of the training batches, so that no lookup depends on them.

    With slopes of 1/8 and more, a head with ALiBi can still find a key among the 64 tokens of a sample. The loss at
    that length does not distinguish such a lookup from one by heads without ALiBi. Among thousands of tokens ALiBi
    hides the right key, and the head votes for a wrong key nearby. The other half of the batches keeps what is tested:
    ALiBi over all tokens.

    Args:
        window: how many tokens these heads see, the query's own included; 0 for no window.
        heads: number of heads in a layer.
        alibi_heads: how many of them, from the first, have ALiBi.
        device: of the masks.

    Attributes:
        narrow: whether the window is on; `draw` sets it.
    """

    def __init__(self, window: int, heads: int, alibi_heads: int, device: torch.device) -> None:
        self.window, self._heads, self._alibi_heads, self._device = window, heads, alibi_heads, device
        self.narrow = False
        self._masks: dict[int, torch.Tensor] = {}

    def draw(self, generator: torch.Generator, strength: float = 1.0) -> None:
        """Draws whether the next batch has the window: with probability strength / 2."""
        if self.window > 0:
            self.narrow = bool(torch.rand((), generator=generator) < strength / 2)

    def mask(self, length: int) -> torch.Tensor | None:
        """(1, heads, length, length) bool: what each head's tokens see. None while the window is off.

        A mask for each head takes time and a compiled form of its own, so batches without the window have no mask.
        """
        if self.window == 0 or not self.narrow:
            return None
        if length not in self._masks:
            position = torch.arange(length, device=self._device)
            back = position[:, None] - position
            seen = (back >= 0).expand(self._heads, -1, -1).clone()
            seen[: self._alibi_heads] &= back < self.window
            self._masks[length] = seen[None]
        return self._masks[length]
