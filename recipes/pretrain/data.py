"""Text to blocks of tokens: files or a streamed Hub data set, a byte-level BPE tokenizer, packing."""

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
    """A file's text for training, and its last share `held_out` for evaluation, cut at a line.

    Raises:
        ValueError: an empty file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{path} has no text")
    cut = int(len(text) * (1.0 - held_out))
    line_end = text.find("\n", cut)
    cut = cut if line_end < 0 else line_end + 1
    return text[:cut], text[cut:]


def stream_hub(name: str, config: str | None, column: str) -> Callable[[], Iterator[str]]:
    """The texts of a Hub data set's train split (or of a folder of data files), streamed, anew at each call."""
    from datasets import load_dataset

    rows: Any = load_dataset(name, config, split="train", streaming=True)

    def texts() -> Iterator[str]:
        for row in rows:
            if column not in row:
                raise ValueError(f"{name} has no column {column!r}; it has {', '.join(row)} (--dataset-column)")
            if row[column]:
                yield row[column]

    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written in it, and none of it is unknown."""
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
    """All texts in one row of tokens, (tokens,) int64, an end-of-text token after each."""
    tokens: list[int] = []
    for text in texts:
        # a million characters at a time, cut at lines: one call on a whole book warns and takes much memory
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
    """Tokens cut into full blocks of `length`, (blocks, length); what is left over is dropped.

    Raises:
        ValueError: less than one block.
    """
    count = len(tokens) // length
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, and one block needs {length}: give more text")
    return tokens[: count * length].view(count, length)


def text_blocks(tokens: torch.Tensor, length: int) -> Dataset[Any]:
    """Blocks in memory, for a shuffling DataLoader."""
    return TensorDataset(packed(tokens, length))


class StreamedBlocks(IterableDataset[Any]):
    """Blocks of `length` tokens packed from a stream of texts while they come, over and over.

    Args:
        texts: gives the stream, anew at each call.
        tokenizer: of the texts.
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
                raise ValueError(f"the data set has no more than the {self.skip} texts that are held out")
