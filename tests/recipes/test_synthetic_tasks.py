"""Every sample obeys its task's definition, at every length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from recipes.synthetic.measuring import autocast, set_matmul_precision
from recipes.synthetic.tasks import IGNORED, TASKS, Batch, Mqmtar, Task
from recipes.synthetic.tasks.mqmtar import swapped
from recipes.synthetic.tasks.words import WordPool, distinct_integers, has_repeats

LENGTHS = (32, 37, 64, 1000, 4096, 65_536)


def samples(task: Task, length: int, size: int = 2) -> tuple[Batch, list[list[int]], list[list[int]]]:
    batch = task.test_batch(size, length, torch.Generator().manual_seed(length))
    return batch, batch.inputs.tolist(), batch.labels.tolist()


def sources_and_answers(task: Task, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Of <bos> source <sep> answer <eos>, after checking that the labels are the next inputs."""
    batch, inputs, labels = samples(task, length)
    for row, answer in zip(inputs, labels, strict=True):
        start = int(batch.scored_at[0]) + 1
        assert row[0] == task.bos and row[start - 1] == task.sep
        assert row[start:] == answer and answer[-1] == task.eos
        assert batch.scored_at.tolist() == list(range(start - 1, len(row) - 1))
        yield row[1 : start - 1], answer[:-1]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["copy", "reverse", "sort", "parity"])
def test_rewriting_tasks(name: str, length: int) -> None:
    rewrite = {
        "copy": lambda source: source,
        "reverse": lambda source: source[::-1],
        "sort": sorted,
        "parity": lambda source: [1 if sum(source) % 2 == 0 else 0],
    }[name]
    task = TASKS[name]()
    for source, answer in sources_and_answers(task, length):
        assert len(source) == length and all(0 <= token < task.data_tokens for token in source)
        assert answer == rewrite(source)


@pytest.mark.parametrize("length", LENGTHS)
def test_flip_flop(length: int) -> None:
    batch, inputs, labels = samples(TASKS["flip_flop"](), length)
    for row, (answer, end) in zip(inputs, labels, strict=True):
        source = row[1 : int(batch.scored_at[0]) + 1]
        commands, bits = source[::2], source[1::2]
        assert len(commands) == length // 2 and commands[0] == 2 and commands[-1] == 4
        assert set(commands[1:-1]) <= {2, 3} and set(bits) <= {0, 1}
        last_write = len(commands) - 1 - commands[::-1].index(2)
        assert answer == bits[last_write] and end == TASKS["flip_flop"]().eos
        assert row[-2:] == [answer, end]


def test_flip_flop_writes_with_the_given_probability() -> None:
    task = TASKS["flip_flop"]()
    commands = task.test_batch(200, 2000, torch.Generator().manual_seed(0)).inputs[:, 3:-4:2]
    assert abs((commands == 2).float().mean() - 0.1) < 0.005


@pytest.mark.parametrize("length", LENGTHS)
def test_two_back(length: int) -> None:
    task = TASKS["two_back"]()
    batch, inputs, labels = samples(task, length)
    for row, answer in zip(inputs, labels, strict=True):
        source = row[1:-1]
        assert row[0] == task.bos and row[-1] == task.eos and source[0] == 0 and len(source) == length + 1
        assert all(1 <= token < 16 for token in source[1:])
        assert answer == [0, 0, *source[:-2]]
        assert batch.scored_at.tolist() == list(range(1, len(row) - 1))


@pytest.mark.parametrize("length", LENGTHS)
def test_local_count(length: int) -> None:
    task = TASKS["local_count"]()
    batch, inputs, labels = samples(task, length, size=3)
    assert batch.scored_at.tolist() == list(range(1, batch.inputs.shape[1] - 1))
    for row, answer in zip(inputs, labels, strict=True):
        source = row[1 : row.index(task.eos)]
        runs = [len(list(run)) for _, run in groupby(source)]
        assert len(runs) == length // 25 and all(2 <= run <= 48 for run in runs)
        assert answer[: len(source)] == [place for run in runs for place in range(run)]
        assert set(answer[len(source) :]) <= {IGNORED}


@pytest.mark.parametrize("length", (16, 100, 4096, 65_536))
def test_max_retrieval(length: int) -> None:
    batch = TASKS["max_retrieval"]().test_batch(2, length, torch.Generator().manual_seed(0))
    items, query = batch.inputs[:, :-1], batch.inputs[:, -1]
    assert items.shape == (2, length, 11) and not query.any() and batch.scored_at.tolist() == [length]
    assert (items[..., 1:].sum(dim=2) == 1).all() and (items[..., 0] < 1).all()
    for row, label in zip(items, batch.labels[:, 0], strict=True):
        assert row[row[:, 0].argmax(), 1:].argmax() == label


def test_max_retrieval_computes_in_float32() -> None:
    task = TASKS["max_retrieval"]()
    batch = task.test_batch(64, 4096, torch.Generator().manual_seed(0))
    largest = batch.inputs[:, :-1, 0].topk(2, dim=1).values
    in_bfloat16, in_float32 = (
        (numbers[:, 0] > numbers[:, 1]).float().mean() for numbers in (largest.bfloat16(), largest)
    )
    assert in_bfloat16 < 0.2 and in_float32 == 1  # so bfloat16 caps what any model can reach
    before = torch.get_float32_matmul_precision()
    try:
        for other, precision in ((task, "highest"), (TASKS["copy"](), "high")):
            set_matmul_precision(other)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", TASKS)
def test_what_computes_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(torch, "autocast", lambda *where, enabled: asked.append((*where, enabled)))
    for device in ("cuda", "cpu"):
        autocast(TASKS[name](), torch.device(device))
    on_a_gpu = name != "max_retrieval"
    assert asked == [("cuda", torch.bfloat16, on_a_gpu), ("cpu", torch.bfloat16, False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast as on a GPU")
def test_which_tasks_compute_in_bfloat16_on_a_gpu() -> None:
    for name, task in TASKS.items():
        with autocast(task(), torch.device("cuda")):
            assert torch.is_autocast_enabled("cuda") == (name != "max_retrieval")


def parsed_mqmtar(
    task: Mqmtar, row: list[int]
) -> tuple[dict[tuple[int, int], tuple[int, int]], list[tuple[int, int]], list[int]]:
    """The pairs, the queries and the answer of one sequence, by the grammar alone."""
    assert row[0] == task.bos and row.count(task.sep) == 1 and row[-1] == task.eos
    middle = row.index(task.sep)
    first_query = row.index(task.QUERY)
    source, query, answer = row[1:first_query], row[first_query:middle], row[middle + 1 : -1]
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    place = 0
    while place < len(source):
        if source[place] == task.SPACE:
            place += 1
            continue
        first, second, separator, third, fourth, space = source[place : place + 6]
        assert separator == task.KEY_VALUE and space == task.SPACE
        assert min(first, second, third, fourth) >= task.FIRST_LETTER
        assert (first, second) not in pairs
        pairs[first, second] = (third, fourth)
        place += 6
    assert len(set(pairs.values())) == len(pairs)
    assert query[::3] == [task.QUERY] * (len(query) // 3)
    return pairs, list(zip(query[1::3], query[2::3], strict=True)), answer


def check_mqmtar(task: Mqmtar, batch: Batch, queries: int) -> None:
    for row, label in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        pairs, asked, answer = parsed_mqmtar(task, row)
        assert len(asked) == queries
        assert answer == [token for key in asked for token in (task.QUERY, *pairs[key])]
        assert label == [*answer, task.eos]
        assert [row[place] for place in batch.answer_letters.tolist()] == [pairs[key][0] for key in asked]
        assert row.index(task.sep) == int(batch.scored_at[0])


@pytest.mark.parametrize("length", LENGTHS)
def test_mqmtar(length: int) -> None:
    task = Mqmtar()
    batch, *_ = samples(task, length)
    check_mqmtar(task, batch, queries=4)
    pairs = int(length * 0.8 // 6)
    assert task.pairs(length) == pairs == len(parsed_mqmtar(task, batch.inputs[0].tolist())[0])
    assert batch.inputs.shape[1] == 1 + pairs * (length // pairs) + 12 + 1 + 12 + 1


def test_mqmtar_spaces_are_spread_as_by_the_authors() -> None:
    """Of 7 spaces before a pair and 5 after it (and its own), 2 are kept at random: hypergeometric."""
    batch = Mqmtar().test_batch(2000, 64, torch.Generator().manual_seed(0))
    slots = batch.inputs[:, 1:65].reshape(-1, 8)
    before = (slots != 0).int().argmax(dim=1)
    shares = [float((before == count).double().mean()) for count in range(3)]
    assert shares == pytest.approx([10 / 66, 35 / 66, 21 / 66], abs=0.015)


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_mqmtar_own_training_data(progress: float) -> None:
    """Near misses, shared letters and the number of queries do not change what a sample is."""
    task = Mqmtar(near_misses=0.3, near_misses_end=1.0, one_letter_end=0.5, min_queries=1, max_queries=8)
    assert task.track == "own" and Mqmtar(layers=2, lr=1e-4).track == "paper"
    data, shapes = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    seen = set()
    for _ in range(8):
        batch = task.training_batch(16, data, shapes, progress)
        queries = (batch.labels.shape[1] - 1) // 3
        seen.add(queries)
        check_mqmtar(task, batch, queries)
        padded = batch.padded(*task.padded_shape())
        assert (padded.inputs.shape[1], padded.scored_at.shape[0]) == task.padded_shape()
        assert (padded.labels != IGNORED).sum() == batch.labels.numel()
    assert len(seen) > 2 and seen <= set(range(1, 9))


def test_mqmtar_near_misses_are_as_many_as_asked_for() -> None:
    def sharing(task: Mqmtar) -> float:
        batch = task.training_batch(400, torch.Generator().manual_seed(0), torch.Generator(), progress=1.0)
        count = 0
        for row in batch.inputs.tolist():
            keys = list(parsed_mqmtar(task, row)[0])
            alike = sum(any((a[0] == b[0]) != (a[1] == b[1]) for b in keys if b != a) for a in keys)
            count += alike >= 2 * (len(keys) // 2)
        return count / 400

    assert sharing(Mqmtar()) < 0.02
    assert 0.4 < sharing(Mqmtar(near_misses_end=0.5)) < 0.55
    assert sharing(Mqmtar(near_misses_end=1.0)) > 0.8
    assert sharing(Mqmtar(one_letter_end=1.0)) > 0.95


def test_mqmtar_pool_limits_the_pairs() -> None:
    task = Mqmtar(pool=100)
    assert task.pairs(65_536) == 100
    check_mqmtar(task, task.test_batch(1, 4096, torch.Generator().manual_seed(0)), queries=4)


def test_training_and_test_words_differ() -> None:
    """The authors draw the words of each of their data sets anew."""
    task = Mqmtar(pool=50)
    train = task.training_batch(64, torch.Generator().manual_seed(0), torch.Generator(), 0.0)
    test = task.test_batch(64, 64, torch.Generator().manual_seed(0))
    keys = [set().union(*(parsed_mqmtar(task, row)[0] for row in batch.inputs.tolist())) for batch in (train, test)]
    assert len(keys[0]) <= 50 and len(keys[1]) <= 50 and len(keys[0] & keys[1]) < 5


def test_mqmtar_swapped_keys() -> None:
    """Distinct, in the share asked for, and answered by their own values."""
    task = Mqmtar(swapped=0.5)
    batch = task.training_batch(400, torch.Generator().manual_seed(0), torch.Generator(), 0.0)
    marker = (batch.inputs == Mqmtar.KEY_VALUE).nonzero()[:, 1].view(400, -1)
    keys = torch.stack([batch.inputs.gather(1, marker - 2), batch.inputs.gather(1, marker - 1)], dim=-1)
    half = keys.shape[1] // 2
    swaps = (keys[:, :half].flip(-1) == keys[:, half : 2 * half]).all(dim=(1, 2))
    assert 0.4 < float(swaps.float().mean()) < 0.6
    assert not has_repeats(keys[..., 0] * 1000 + keys[..., 1]).any()
    same = torch.tensor([[[3, 3], [4, 5], [6, 7], [8, 9]]])  # a letter twice is its own swap
    assert torch.equal(swapped(same, 1.0, torch.Generator()), same)
    with pytest.raises(ValueError, match="swapped must be from 0 to 1"):
        Mqmtar(swapped=2.0)


@pytest.mark.parametrize("name", TASKS)
def test_training_batches_fit_their_padded_shape(name: str) -> None:
    task = TASKS[name]()
    data, shapes = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(6):
        batch = task.training_batch(3, data, shapes, 0.0)
        lengths.add(batch.inputs.shape[1])
        padded = batch.padded(*task.padded_shape())
        assert (padded.inputs.shape[1], padded.scored_at.shape[0]) == task.padded_shape()
        assert torch.equal(padded.inputs[:, : batch.inputs.shape[1]], batch.inputs)
    assert len(lengths) > 1 or task.min_length == task.max_length


def test_distinct_integers_are_uniform_without_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    for count, upper in ((3, 12), (12, 12), (8, 10_000), (100, 10_000)):
        drawn = distinct_integers(2000, count, upper, generator)
        assert drawn.shape == (2000, count) and not has_repeats(drawn).any()
        assert int(drawn.min()) >= 0 and int(drawn.max()) < upper
        assert abs(drawn.double().mean() / ((upper - 1) / 2) - 1) < 0.03
    assert has_repeats(torch.tensor([[1, 2, 1], [1, 2, 3]])).tolist() == [True, False]


def test_words_that_share_a_letter() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = WordPool.drawn(500, 3, 16 * 2, generator)
    assert len({tuple(word) for word in pool.words.tolist()}) == 500
    indices = torch.arange(500)
    near = pool.words[pool.sharing_a_letter(indices, 2, generator)]
    assert (near == pool.words).any(dim=1).all() and ((near == pool.words).sum(dim=1) == 1).float().mean() > 0.9
    crossed = pool.words[pool.sharing_a_letter(indices, 2, generator, crossed=1.0)]
    assert bool((crossed.flip(-1) == pool.words[indices]).any(-1).all())
    half = pool.words[pool.sharing_a_letter(indices, 2, generator, crossed=0.5)]
    assert 0.3 < float((half == pool.words[indices]).any(-1).float().mean()) < 0.8
    first = pool.words[pool.sharing_a_letter(indices, 1, generator)]
    assert torch.equal(first[:, 0], pool.words[:, 0])
    together = pool.words[pool.all_sharing_a_letter(50, 4, 2, generator)]
    same = (together == together[:, :1]).all(dim=1)
    assert same.any(dim=1).all()
