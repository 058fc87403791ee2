"""What is done in training only: corrupted inputs, changed scores, heads left out, a window for ALiBi."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from recipes.synthetic.tasks import Batch, Task

__all__ = ["AlibiWindow", "HeadDrop", "ScoreJitter", "corrupted_answers", "corrupted_questions"]


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


def corrupted_questions(batch: Batch, task: Task, probability: float, generator: torch.Generator) -> Batch:
    """One letter of what is asked for, as an input, replaced by another; the labels stay.

    The key that is asked for has to be found by the letter that is left, in its place. Of a few keys in a training
    sample hardly two have a letter in common, so a lookup may leave a letter out, or its place, and lose next to
    nothing; among thousands of keys it is wrong. Half of the letters put in are random. The other half are letters that
    some key of the sample has in the other place: a lookup that does not tell places apart finds that key as well.
    """
    if probability == 0:
        return batch
    letters = batch.question_letters.shape[1]
    device = batch.inputs.device
    asked = batch.inputs[:, batch.question_letters]  # (batch, questions, letters)
    noise = torch.randint(task.FIRST_LETTER, task.data_tokens, asked.shape, generator=generator, device=device)
    misplaced = task.misplaced_letters(batch, generator)
    noise = torch.where(torch.rand(asked.shape, generator=generator, device=device) < 0.5, noise, misplaced)
    place = torch.randint(letters, asked.shape[:2], generator=generator, device=device)
    chosen = torch.rand(asked.shape[:2], generator=generator, device=device) < probability
    chosen = chosen[..., None] & (place[..., None] == torch.arange(letters, device=device))
    inputs = batch.inputs.clone()
    inputs[:, batch.question_letters] = torch.where(chosen, noise, asked)
    return replace(batch, inputs=inputs)


class ScoreJitter:
    """Random changes of the scores q k of all heads without ALiBi, in training: right keys have to win by much.

    All scores of a sample are multiplied by one factor in [low, 1]; each channel's part q_c k_c is left out with
    probability `drop`, the same channels in all rows of a sample; and each key gets normal noise of `noise` times its
    root mean square. Scores are linear in queries and keys, so this is done to what each layer's projections give: one
    place for every method, whatever its length scaling.

    Args:
        model: a model of this recipe.
        low: the smallest factor, above 0; 1 for none.
        alibi_heads: how many heads, from the first, are left alone.
        drop: probability with which a channel is left out; 0 for none.
        noise: size of the keys' noise; 0 for none.
        noise_on_all: whether heads with ALiBi get noise too. Without it, strong noise makes a model look up by heads
            with ALiBi, which don't see far.
        log_uniform: whether the factor's logarithm is uniform, not the factor: with a small `low`, scores of any size
            come down to where more than one key has a weight. A row whose weight lies on one key alone has no gradient,
            right or wrong.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        low: float,
        alibi_heads: int,
        drop: float = 0.0,
        noise: float = 0.0,
        noise_on_all: bool = False,
        log_uniform: bool = False,
    ) -> None:
        if not 0 < low <= 1:
            raise ValueError(f"the smallest factor must lie above 0 and be at most 1, got {low}")
        if not 0 <= drop < 1:
            raise ValueError(f"the probability of leaving a channel out must be at least 0 and below 1, got {drop}")
        if noise < 0:
            raise ValueError(f"the size of the keys' noise must be at least 0, got {noise}")
        self.low, self.drop, self.noise, self.log_uniform = low, drop, noise, log_uniform
        width = model.config.num_attention_heads * model.config.head_dim
        self._head_dim = model.config.head_dim
        self._unchanged = alibi_heads * self._head_dim
        self._channels = width - self._unchanged
        self._without_noise = 0 if noise_on_all else self._unchanged
        self._noisy_channels = width - self._without_noise
        self._factor: torch.Tensor | None = None
        self._added: torch.Tensor | None = None
        for layer in model.model.layers:
            if low < 1 or drop > 0:
                layer.self_attn.q_proj.register_forward_hook(self._scaled)
            if noise > 0:
                layer.self_attn.k_proj.register_forward_hook(self._noisy)

    def draw(
        self,
        size: int,
        length: int,
        generator: torch.Generator,
        strength: float = 1.0,
        noise_times: float | torch.Tensor = 1.0,
    ) -> None:
        """New factors and noise for the next batch, of `size` samples and `length` positions.

        Args:
            strength: how much of all of it, from 0 (none) to 1.
            noise_times: a further factor on the noise.
        """
        device = generator.device
        uniform = torch.rand((size, 1, 1), generator=generator, device=device)
        if self.log_uniform:
            self._factor = self.low ** (strength * uniform)
        else:
            self._factor = 1 - strength * (1 - self.low) * uniform
        if self.drop > 0:
            kept = torch.rand((size, 1, self._channels), generator=generator, device=device) >= strength * self.drop
            self._factor = self._factor * kept
        if self.noise > 0:
            noise = torch.randn((size, length, self._noisy_channels), generator=generator, device=device)
            self._added = noise.mul_(noise_times * (strength * self.noise))

    def lowest(self, size: int, device: torch.device) -> None:
        """The smallest factor for each of `size` samples, without noise: one hard view for all of them."""
        self._factor = torch.full((size, 1, 1), self.low, device=device)
        self._added = None

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
        free = key[..., self._without_noise :]
        heads = free.unflatten(-1, (-1, self._head_dim))
        size = heads.detach().square().mean(-1, keepdim=True).sqrt().expand_as(heads).flatten(-2)
        return torch.cat([key[..., : self._without_noise], (free + size * self._added).to(key.dtype)], dim=-1)


class HeadDrop:
    """Leaves out heads without ALiBi, in training: each of them has to be right alone.

    A sample keeps at least one of a layer's heads, and those that it keeps are scaled up to the sum of all. Heads that
    look up the same outvote each other's errors; once their majority is right the loss says nothing of the others, and
    what is wrong in a few heads at a training length is wrong in most of them among a thousand times as many keys.

    Args:
        model: a model of this recipe.
        probability: with which a head is left out, of all but one.
        alibi_heads: how many heads, from the first, always stay.
    """

    def __init__(self, model: PreTrainedModel, probability: float, alibi_heads: int) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"the probability of leaving a head out must be at least 0 and below 1, got {probability}")
        self.probability = probability
        self._layers = len(model.model.layers)
        self._heads, self._always = model.config.num_attention_heads - alibi_heads, alibi_heads
        self._head_dim = model.config.head_dim
        self._factors: list[torch.Tensor] | None = None  # of each layer, (samples, 1, channels)
        if probability > 0 and self._heads > 0:
            for index, layer in enumerate(model.model.layers):
                layer.self_attn.o_proj.register_forward_pre_hook(partial(self._kept, index))

    def draw(self, size: int, generator: torch.Generator, strength: float = 1.0) -> None:
        """Which heads each of the next `size` samples keeps; a head is left out with strength x probability."""
        if self.probability == 0 or self._heads == 0:
            return
        device = generator.device
        shape = (self._layers, size, self._heads)
        kept = torch.rand(shape, generator=generator, device=device) >= strength * self.probability
        one = torch.randint(self._heads, (*shape[:2], 1), generator=generator, device=device)
        kept = kept.scatter(2, one, True)
        factor = kept * (self._heads / kept.sum(dim=2, keepdim=True))
        factor = torch.cat([factor.new_ones((*shape[:2], self._always)), factor], dim=2)
        self._factors = list(factor.repeat_interleave(self._head_dim, dim=2)[:, :, None].unbind())

    def _kept(
        self, layer: int, projection: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if not projection.training or self._factors is None:
            return None
        return ((inputs[0] * self._factors[layer]).to(inputs[0].dtype),)


class AlibiWindow:
    """Heads with ALiBi see only the last tokens, in half of the training batches: no lookup may lean on them.

    Slopes of 1/8 and more still let a head with ALiBi find a key among a sample's 64 tokens, and no loss at that length
    tells such a lookup from one by heads without ALiBi. Among thousands of tokens ALiBi hides the right key, and what
    such a head then says of the keys nearby is a vote for a wrong one. The other half of the batches keeps what is
    tested: ALiBi on all tokens.

    Args:
        window: how many tokens, a token itself counted; 0 for none of this.
        heads: of a layer.
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
        """Whether the next batch has the window: with half of `strength`, from 0 to 1, as probability."""
        if self.window > 0:
            self.narrow = bool(torch.rand((), generator=generator) < strength / 2)

    def mask(self, length: int) -> torch.Tensor | None:
        """(1, heads, length, length) bool, what each head's tokens see; None while the window is off: all before them.

        A mask for each head takes time, and a compiled form of its own; the batches without it do without.
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
