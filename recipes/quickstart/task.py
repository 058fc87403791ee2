"""Associative recall: a stream of key/value pairs, then queries that repeat a key and ask for its value.

    <s> qa 37 bx 04 zz 91 ... ? bx 04 qa 37

Keys are the 676 pairs of letters, and a key occurs at most once in a stream. Values are the numbers 00 to 99. After "?"
come the queries. Each is a key of the stream, followed by its value, which the model has to predict.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

KEYS = [first + second for first in string.ascii_lowercase for second in string.ascii_lowercase]
VALUES = [f"{number:02d}" for number in range(100)]
WORDS = ["<s>", "?", *KEYS, *VALUES]
START, ASK, FIRST_KEY, FIRST_VALUE = 0, 1, 2, 2 + len(KEYS)


@dataclass(frozen=True)
class Batch:
    """Streams of one length, and the positions of their answers.

    Attributes:
        tokens: (batch, length) int64.
        answers_at: (queries,) int64, positions of the answers. The token before an answer is the query's key.
    """

    tokens: torch.Tensor
    answers_at: torch.Tensor

    @property
    def answers(self) -> torch.Tensor:
        """The right values, (batch, queries) int64."""
        return self.tokens[:, self.answers_at]


def num_pairs(length: int, num_queries: int) -> int:
    """How many pairs a stream of `length` tokens has, which is <s>, the pairs, ? and `num_queries` queries."""
    return (length - 2 - 2 * num_queries) // 2


def sample_batch(batch_size: int, length: int, num_queries: int, generator: torch.Generator) -> Batch:
    """Random streams of exactly `length` tokens on the CPU.

    Args:
        batch_size: how many streams.
        length: tokens in each, even.
        num_queries: distinct keys that are asked for, at most as many as there are pairs.
        generator: the source of randomness.

    Raises:
        ValueError: the length is odd, too short for the queries, or too long for the number of keys.
    """
    pairs = num_pairs(length, num_queries)
    if length % 2 != 0 or not 1 <= num_queries <= pairs <= len(KEYS):
        raise ValueError(
            f"a stream needs an even length with 1 <= queries <= pairs <= {len(KEYS)}; length {length} with "
            f"{num_queries} queries has {pairs} pairs"
        )
    keys = torch.rand(batch_size, len(KEYS), generator=generator).topk(pairs).indices + FIRST_KEY
    values = torch.randint(len(VALUES), (batch_size, pairs), generator=generator) + FIRST_VALUE
    asked = torch.rand(batch_size, pairs, generator=generator).topk(num_queries).indices
    stream = torch.stack([keys, values], dim=-1).flatten(1)
    queries = torch.stack([keys.gather(1, asked), values.gather(1, asked)], dim=-1).flatten(1)
    start = torch.full((batch_size, 1), START)
    tokens = torch.cat([start, stream, torch.full_like(start, ASK), queries], dim=1)
    return Batch(tokens, torch.arange(length - 2 * num_queries + 1, length, 2))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of a stream."""
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)
