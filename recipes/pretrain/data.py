"""Turns text into blocks of tokens: reads files or a streamed data set, trains a byte-level BPE tokenizer, packs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def split_file(path: Path, held_out: float) -> tuple[str, str]:
    """Splits a file at the end of a line into the text to train on and the last part, a share `held_out`, to test on.

    Raises:
        ValueError: the file is empty.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{path} has no text: give a file with text")
    cut = int(len(text) * (1.0 - held_out))
    line_end = text.find("\n", cut)
    cut = cut if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]


def stream_hub(name: str, config: str | None, column: str) -> Callable[[], Iterator[str]]:
    """A function that streams the texts of a data set from its start.

    Args:
        name: of a data set on the Hub, of which the train split is read, or a folder of data files.
        config: of the data set, if it has several.
        column: that holds the text.
    """
    from datasets import load_dataset

    rows: Any = load_dataset(name, config, split="train", streaming=True)

    def texts() -> Iterator[str]:
        for row in rows:
            if column not in row:
                raise ValueError(f"{name} has no column {column!r}: give --dataset-column one of {', '.join(row)}")
            if row[column]:
                yield row[column]

    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which can write any text without unknown tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All texts as one sequence, (tokens,) int64, with an end-of-text token after each."""
    tokens: list[int] = []
    for text in texts:
        # a million characters at a time, cut at lines: one call on a whole book takes much memory
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= 1_000_000:
                tokens += tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
                lines, size = [], 0
        tokens += tokenizer("".join(lines), add_special_tokens=False, verbose=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    return torch.tensor(tokens, dtype=torch.long)


def packed(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cuts tokens into full blocks, (blocks, length). The rest is dropped.

    Raises:
        ValueError: there are fewer tokens than one block needs.
    """
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"expected at least one block of {length} tokens, the text has {len(tokens)}: give more text")
    return tokens[: count * length].view(count, length)


def text_blocks(tokens: torch.Tensor, length: int) -> Dataset[Any]:
    """Blocks in memory, which a DataLoader can shuffle."""
    return TensorDataset(packed(tokens, length))


class StreamedBlocks(IterableDataset[Any]):
    """Blocks of tokens, packed from a stream of texts. At its end the stream starts again.

    Args:
        texts: a function that streams the texts from their start.
        tokenizer: turns them into tokens.
        length: tokens in a block.
        skip: how many texts at the start are held out.
    """

    def __init__(
        self, texts: Callable[[], Iterator[str]], tokenizer: PreTrainedTokenizerBase, length: int, skip: int
    ) -> None:
        self.texts, self.tokenizer, self.length, self.skip = texts, tokenizer, length, skip

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        rest = torch.empty(0, dtype=torch.long)
        while True:
            empty = True
            for text in islice(self.texts(), self.skip, None):
                empty = False
                rest = torch.cat([rest, tokenize([text], self.tokenizer)])
                while len(rest) >= self.length:
                    yield (rest[: self.length],)
                    rest = rest[self.length :]
            if empty:
                raise ValueError(
                    f"the data set has only the {self.skip} texts that are held out: lower --held-out-texts"
                )
