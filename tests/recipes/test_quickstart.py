"""The quickstart: its task obeys the definition, and a run of a few steps works from end to end."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.common import REPOSITORY
from recipes.quickstart import report, run, task


@pytest.mark.parametrize("length", [8, 12, 64, 128, 256, 512, 1024])
def test_a_stream_obeys_the_definition(length: int) -> None:
    queries = 1 if length < 16 else 8
    batch = task.sample_batch(16, length, queries, torch.Generator().manual_seed(length))
    assert batch.tokens.shape == (16, length)
    pairs = task.num_pairs(length, queries)
    for tokens, answers in zip(batch.tokens.tolist(), batch.answers.tolist(), strict=True):
        words = [task.WORDS[token] for token in tokens]
        assert words[0] == "<s>" and words[1 + 2 * pairs] == "?" and words.count("?") == 1
        keys, values = words[1 : 1 + 2 * pairs : 2], words[2 : 1 + 2 * pairs : 2]
        assert len(set(keys)) == pairs and set(keys) <= set(task.KEYS) and set(values) <= set(task.VALUES)
        truth = dict(zip(keys, values, strict=True))
        asked = words[2 + 2 * pairs :]
        assert len(set(asked[::2])) == queries  # no query is answered by an earlier one
        assert [truth[key] for key in asked[::2]] == asked[1::2] == [task.WORDS[answer] for answer in answers]


def test_streams_are_reproducible_and_use_all_words() -> None:
    first, again = (task.sample_batch(256, 64, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert set(first.tokens.unique().tolist()) == set(range(len(task.WORDS)))
    other = task.sample_batch(256, 64, 8, torch.Generator().manual_seed(4))
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize(("length", "queries"), [(63, 4), (8, 3), (64, 0), (2048, 8)])
def test_an_impossible_stream_is_refused(length: int, queries: int) -> None:
    with pytest.raises(ValueError, match=f"length {length} with {queries} queries"):
        task.sample_batch(2, length, queries, torch.Generator())


def test_training_batches_keep_to_the_training_length() -> None:
    generator = torch.Generator().manual_seed(0)
    for longest in (16, run.TRAIN_LENGTH):
        lengths = [run.training_batch(longest, 2, generator).tokens.shape[1] for _ in range(300)]
        assert min(lengths) == run.SHORTEST and max(lengths) == longest


def test_the_tokenizer_reads_and_writes_a_stream() -> None:
    tokens = task.sample_batch(1, 64, 8, torch.Generator().manual_seed(0)).tokens[0]
    tokenizer = task.build_tokenizer()
    assert tokenizer(tokenizer.decode(tokens), add_special_tokens=False)["input_ids"] == tokens.tolist()


def test_models_have_the_same_size() -> None:
    models = [run.build_model(method) for method in run.METHODS]
    sizes = [model.num_parameters() for model in models]
    assert max(sizes) - min(sizes) < 0.005 * min(sizes)
    assert all(model.config.num_hidden_layers == models[0].config.num_hidden_layers for model in models)


@pytest.mark.slow
def test_a_short_run_works_from_end_to_end(tmp_path: Path) -> None:
    arguments = ["--steps", "3", "--batch-size", "4", "--streams", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "recipes.quickstart.run", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompt  <s>") == 2 and "1,024 (16x)" in done.stdout
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["command"] == f"python -m recipes.quickstart.run {shlex.join(arguments)}"
    assert [one["method"] for one in content["runs"]] == list(run.METHODS)
    assert set(content["runs"][0]["accuracy"]) == {"64", "128", "256", "512", "1024"}
    for entry in ("seeds", "device", "versions", "commit", "uncommitted", "steps", "streams_per_length"):
        assert entry in content
    softmax, ours = (content["runs"][index]["keys_in_use"] for index in (0, 2))
    assert softmax["1024"] == 1016 and 1 <= ours["1024"] < 1016  # 8 queries see 1,009 to 1,023 keys
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_accuracy_is_the_share_of_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = task.sample_batch(4, 64, run.QUERIES, torch.Generator().manual_seed(1_000_064))

    def first_half_right(model: object, batch: task.Batch) -> torch.Tensor:
        answers = torch.where(torch.arange(run.QUERIES) < run.QUERIES // 2, batch.answers, batch.answers - 1)
        return torch.nn.functional.one_hot(answers, len(task.WORDS)).float()

    monkeypatch.setattr(run, "answer_logits", first_half_right)
    assert streams.tokens.shape == (4, 64)
    assert run.evaluate(run.build_model("softmax + RoPE"), 64, 4) == 0.5


def test_several_rates_are_several_rows() -> None:
    runs = [
        {"method": "m", "learning_rate": rate, "accuracy": {"64": share, "128": share}}
        for rate, share in ((0.1, 0.5), (0.1, 1.0), (0.2, 0.25))
    ]
    values = report.values_by_method({"runs": runs}, "accuracy", 100.0)
    assert values == {"m, learning rate 0.1": [[50.0, 50.0], [100.0, 100.0]], "m, learning rate 0.2": [[25.0, 25.0]]}
