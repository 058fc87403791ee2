"""Every code block of the README and of the site runs, in the order of its page.

Pages name models and data sets of the Hub. Here these names are folders of the working directory, with a tiny model
and a few lines of text, which transformers and datasets prefer to the Hub.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from code_blocks import ROOT, Block, blocks, check_shell

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN_ONLY = ("text", "bibtex")
HUB_MODEL = "meta-llama/Llama-3.2-1B"
HUB_TEXT = "roneneldan/TinyStories"
STEPS = 2  # of a Trainer, whatever a page asks for


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the names of the Hub that pages use are folders."""
    folder = tmp_path_factory.mktemp("hub")
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / HUB_MODEL)
    tokenizer().save_pretrained(folder / HUB_MODEL)
    text = folder / HUB_TEXT / "train.jsonl"
    text.parent.mkdir(parents=True)
    text.write_text("".join(json.dumps({"text": f"Once there were {n} cats."}) + "\n" for n in range(16)))
    return folder


@pytest.fixture
def small_runs(hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hub names lead to `hub`, a Trainer stops after a few steps, torch.compile leaves the model as it is."""
    monkeypatch.chdir(tmp_path)
    for owner in hub.iterdir():
        (tmp_path / owner.name).symlink_to(owner)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    as_given, compile_signature = TrainingArguments.__post_init__, inspect.signature(torch.compile)

    def stop_early(arguments: Any) -> None:
        arguments.max_steps, arguments.use_cpu = STEPS, not torch.cuda.is_available()
        as_given(arguments)

    def leave_uncompiled(model: Any, **options: Any) -> Any:
        compile_signature.bind(model, **options)
        return model

    monkeypatch.setattr(TrainingArguments, "__post_init__", stop_early)
    monkeypatch.setattr(torch, "compile", leave_uncompiled)


def run(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Run one block, or check it where its language is not Python."""
    if block.language == "python":
        lines_before = "\n" * (block.line - 1)
        exec(compile(lines_before + block.text, str(page), "exec"), names)
    elif block.language == "bash":
        check_shell(block)
    elif block.language == "json":
        json.loads(block.text)
    else:
        assert block.language in SHOWN_ONLY, f"a block of {block.language!r} is neither run nor checked"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks(page: Path, small_runs: None) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        try:
            run(block, page, names)
        except Exception as error:
            error.add_note(f"in the code block of {page.relative_to(ROOT)} that begins on line {block.line}")
            raise
