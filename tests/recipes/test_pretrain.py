"""Pretraining on a few kilobytes of text: trains, resumes exactly, measures, reloads."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.pretrain import data, perplexity, pretrain

TINY = [
    "--vocab-size",
    "300",
    "--length",
    "16",
    "--layers",
    "1",
    "--hidden-size",
    "16",
    "--heads",
    "2",
    "--batch-size",
    "4",
    "--warm-up",
    "2",
    "--cpu",
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = random.Random(0)
    nouns, verbs = ["the cat", "a dog", "Ænna", "the old king", "my sister"], ["saw", "feeds", "is like", "fears"]
    lines = [f"{words.choice(nouns)} {words.choice(verbs)} {words.choice(nouns)}." for _ in range(400)]
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("attention", ["softmax", "asentmax"])
def test_trains_resumes_with_the_same_losses_and_reloads(attention: str, text_file: Path, tmp_path: Path) -> None:
    command = ["--text", str(text_file), "--attention", attention, *TINY, "--gradient-accumulation", "2"]
    command += ["--steps", "40", "--learning-rate", "0.01", "--held-out", "0.2"]
    whole = pretrain.main([*command, "--out", str(tmp_path / "whole")])
    assert len(whole) == 40 and sum(whole[-5:]) < sum(whole[:5]) - 2.5

    # cut off in the middle of an epoch that isn't the first
    blocks = len(data.text_blocks(data.tokenize([data.split_file(text_file, 0.2)[0]], _tokenizer(tmp_path)), 16))
    assert blocks < 25 * 8 and (25 * 8) % (blocks // 4 * 4) != 0
    cut = pretrain.main([*command, "--out", str(tmp_path / "cut"), "--stop-after", "25"])
    assert cut == whole[:25]
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    rest = pretrain.main([*command, "--out", str(tmp_path / "cut"), "--resume"])
    assert rest == whole[25:]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert tokenizer.decode(tokenizer("Ænna saw a dog.")["input_ids"]) == "Ænna saw a dog."
    assert (getattr(model.config, "asentmax", None) is None) == (attention == "softmax")
    inputs = tokenizer("the old king", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).shape[1] > inputs["input_ids"].shape[1]

    record = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert record["method"] == {"softmax": "softmax + RoPE", "asentmax": "ASEntmax + NAPE"}[attention]
    assert record["settings"]["steps"] == 40 and record["versions"]["torch"] == torch.__version__


def _tokenizer(tmp_path: Path):
    return AutoTokenizer.from_pretrained(tmp_path / "whole")


def test_checkpoints_are_compared(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for attention in ("softmax", "entmax"):
        command = ["--text", str(text_file), "--attention", attention, *TINY, "--steps", "2", "--held-out", "0.3"]
        pretrain.main([*command, "--out", str(tmp_path / attention)])
    perplexity.main([str(tmp_path / "softmax"), str(tmp_path / "entmax"), "--out", str(tmp_path), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "softmax + RoPE" in printed and "entmax + NAPE" in printed and "128 (8x)" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["results"]["softmax + RoPE"]["by_length"]) == ["16", "32", "64", "128"]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_data_set_is_streamed(text_file: Path, tmp_path: Path) -> None:
    """The Hub's code path, on a folder of data files in place of a name."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"text": line} for line in text_file.read_text(encoding="utf-8").splitlines()]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    command = ["--dataset", str(folder), "--held-out-texts", "100", *TINY, "--steps", "6"]
    whole = pretrain.main([*command, "--out", str(tmp_path / "whole")])
    assert len(whole) == 6 and all(math.isfinite(loss) for loss in whole)
    pretrain.main([*command, "--out", str(tmp_path / "cut"), "--stop-after", "4"])
    assert pretrain.main([*command, "--out", str(tmp_path / "cut"), "--resume"]) == whole[4:]


def test_streamed_blocks_hold_out_the_first_texts_and_lose_nothing() -> None:
    texts = [f"text number {number}\n" for number in range(30)]
    tokenizer = data.train_tokenizer(texts, 280, 64)
    blocks = iter(data.StreamedBlocks(lambda: iter(texts), tokenizer, 8, skip=10))
    streamed = torch.cat([next(blocks)[0] for _ in range(20)])
    once = data.tokenize(texts[10:], tokenizer)
    assert torch.equal(streamed, once.repeat(1 + len(streamed) // len(once))[: len(streamed)])
    with pytest.raises(ValueError, match="held out"):
        next(iter(data.StreamedBlocks(lambda: iter(texts), tokenizer, 8, skip=30)))


def test_perplexity_is_that_of_each_window_by_itself(text_file: Path) -> None:
    texts = [text_file.read_text(encoding="utf-8")]
    tokenizer = data.train_tokenizer(texts, 300, 64)
    arguments = pretrain.parse_arguments(["--text", str(text_file), "--attention", "asentmax", *TINY])
    torch.manual_seed(0)
    model = pretrain.build_model(arguments, len(tokenizer), tokenizer.eos_token_id).eval()
    tokens = data.tokenize(texts, tokenizer)[: 3 * 32 + 5]
    results = perplexity.perplexity_by_length(model, tokens, [16, 32], last=8, progress=False)
    assert results["tokens"] == 96 and results["last_tokens"] == 24
    for length, windows in ((16, 6), (32, 3)):
        losses, ends = [], []
        for window in tokens[:96].view(windows, length):
            with torch.no_grad():
                logits = model(window[None]).logits[0].double()
            wanted = -torch.log_softmax(logits[:-1], -1).gather(1, window[1:, None])[:, 0]
            losses.append(wanted)
            ends.append(wanted[-8:])
        ends = ends[32 // length - 1 :: 32 // length]
        one = results["by_length"][str(length)]
        assert one["windows"] == windows
        assert one["perplexity"] == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)
        assert one["last_perplexity"] == pytest.approx(math.exp(torch.cat(ends).mean()), rel=1e-4)


def test_bad_input_is_named(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(SystemExit):
        pretrain.parse_arguments(["--attention", "asentmax"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text"):
        data.split_file(tmp_path / "empty.txt", 0.1)
    with pytest.raises(ValueError, match="give more text"):
        data.packed(torch.arange(7), 8)
    with pytest.raises(SystemExit, match="no state to resume"):
        pretrain.main(["--text", str(text_file), *TINY, "--resume", "--out", str(tmp_path / "none")])
