r"""A lookup without the model around it: which training makes it precise, in minutes on a CPU.

    python recipes/synthetic/lookup.py             # every variant, 3 seeds (two hours): lookup.json and a table
    python recipes/synthetic/lookup.py --variants "head drop 0.9" --seeds 0 --steps 300

MQMTAR's step that errs: heads look for the key of two letters that equals the query's,

.. math::
    q = W_q\,\mathrm{norm}(a_{w_1} + b_{w_2}), \quad k = W_k\,\mathrm{norm}(c_{w_1} + d_{w_2}), \quad
    \bar p = \frac1H \sum_h \mathrm{entmax}_{1.5}(q_h^\top k_h / \sqrt{d}), \quad
    \mathrm{loss} = \mathrm{CE}(g\,\bar p)

with letters' embeddings, projections and the gain g learned. It trains on 8 keys, as many as 64 tokens hold, and is
tested among 8,738 of another pool, as many as 65,536 tokens hold. e is the share of wrong answers a key.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_asentmax.mappings import entmax
from recipes.common import results_header, write_json
from recipes.synthetic.replay import HardReplay
from recipes.synthetic.settings import RunSettings
from recipes.synthetic.tasks import Batch
from recipes.synthetic.tasks.mqmtar import Mqmtar, confusable
from recipes.synthetic.tasks.words import WordPool
from recipes.synthetic.trainer import learning_rate

HEADS, HEAD_DIM, WIDTH = 8, 32, 128
KEYS, TEST_KEYS, POOL = 8, 8738, 10_000
BATCH, PEAK, WARMUP = 1024, 3e-3, 200
TEST_QUERIES, TEST_BATCH = 6000, 500


@dataclass(frozen=True)
class Variant:
    """How to train.

    Attributes:
        near: share of the samples half of whose keys share a letter with another.
        noise: of each key, in its root mean square. jitter: scores times a factor in [jitter, 1] per sample.
        head_drop: probability with which a head is left out, per sample, of all but one.
        gain: g at the start.
        replay: share of a batch that are hard samples seen before, from a quarter of the run on.
        corrupt: probability with which one letter of the query is another one: a random one or, half of the time, one
            that another key has in the other place.
        alike: size of the noise that tells a letter's embeddings of the two places apart at the start; None: each has
            its own.
    """

    near: float = 0.5
    noise: float = 0.3
    jitter: float = 0.4
    head_drop: float = 0.0
    gain: float = 30.0
    replay: float = 0.0
    corrupt: float = 0.0
    alike: float | None = None


VARIANTS = {
    "near misses, noise, jitter": Variant(),
    "without noise and jitter": Variant(noise=0.0, jitter=1.0),
    "gain 5": Variant(gain=5.0),
    "head drop 0.5": Variant(head_drop=0.5),
    "head drop 0.75": Variant(head_drop=0.75),
    "head drop 0.9": Variant(head_drop=0.9),
    "head drop 0.75, without noise and jitter": Variant(head_drop=0.75, noise=0.0, jitter=1.0),
    "no near misses": Variant(near=0.0),
    "no near misses, gain 5": Variant(near=0.0, gain=5.0),
    "no near misses, gain 8": Variant(near=0.0, gain=8.0),
    "no near misses, head drop 0.75": Variant(near=0.0, head_drop=0.75),
    "no near misses, head drop 0.9": Variant(near=0.0, head_drop=0.9),
    "no near misses, replay 0.125": Variant(near=0.0, replay=0.125),
    "no near misses, head drop 0.75, replay 0.125": Variant(near=0.0, head_drop=0.75, replay=0.125),
    "no near misses, corrupted queries 0.3": Variant(near=0.0, corrupt=0.3),
    "no near misses, head drop 0.75, corrupted queries 0.3": Variant(near=0.0, head_drop=0.75, corrupt=0.3),
    "places alike, no near misses, head drop 0.75": Variant(near=0.0, head_drop=0.75, alike=0.05),
    "places alike, no near misses, head drop 0.75, replay 0.125": Variant(
        near=0.0, head_drop=0.75, replay=0.125, alike=0.05
    ),
    "places alike, no near misses, head drop 0.75, corrupted queries 0.3": Variant(
        near=0.0, head_drop=0.75, corrupt=0.3, alike=0.05
    ),
}


class Lookup(nn.Module):
    """Queries and keys of words."""

    def __init__(self, gain: float, alike: float | None = None) -> None:
        super().__init__()
        letters = Mqmtar.FIRST_LETTER + Mqmtar.LETTERS
        self.letters = nn.ModuleDict(
            {f"{side}{place}": nn.Embedding(letters, WIDTH) for side in ("query", "key") for place in (0, 1)}
        )
        for table in self.letters.values():
            nn.init.normal_(table.weight, std=0.5)  # type: ignore[arg-type]
        if alike is not None:
            for side in ("query", "key"):
                first, second = (self.letters[f"{side}{place}"] for place in (0, 1))
                noise = alike * torch.randn(letters, WIDTH)
                second.load_state_dict({"weight": first.state_dict()["weight"] + noise})
        self.projections = nn.ModuleDict(
            {side: nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False) for side in ("query", "key")}
        )
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, words: torch.Tensor, side: str) -> torch.Tensor:
        """(..., 2) letters -> (..., HEADS, HEAD_DIM)."""
        hidden = sum(self.letters[f"{side}{place}"](words[..., place]) for place in (0, 1))
        hidden = nn.functional.rms_norm(hidden, (WIDTH,), eps=1e-6)
        return self.projections[side](hidden).unflatten(-1, (HEADS, HEAD_DIM))


def _asked(words: torch.Tensor, asked: torch.Tensor, corrupt: float) -> torch.Tensor:
    """(batch, 2) the words that are asked for, of (batch, keys, 2), one letter of some of them another one."""
    rows = torch.arange(len(words))
    own = words[rows, asked]
    if corrupt == 0:
        return own
    random = torch.randint(Mqmtar.FIRST_LETTER, Mqmtar.FIRST_LETTER + Mqmtar.LETTERS, own.shape)
    misplaced = words[rows, (asked + 1 + torch.randint(KEYS - 1, asked.shape)) % KEYS].flip(1)
    letters = torch.where(torch.rand(own.shape) < 0.5, random, misplaced)
    place = torch.randint(2, (len(words), 1)) == torch.arange(2)
    return torch.where(place & (torch.rand(len(words), 1) < corrupt), letters, own)


def _as_batch(words: torch.Tensor, asked: torch.Tensor) -> Batch:
    nowhere = torch.zeros(1, dtype=torch.int64)
    return Batch(words, nowhere, asked[:, None], nowhere)


def train(variant: Variant, seed: int, steps: int) -> Lookup:
    """A lookup trained for so many updates; the learning rate falls over the second half."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pool = WordPool.drawn(POOL, Mqmtar.FIRST_LETTER, Mqmtar.LETTERS, torch.Generator().manual_seed(0))
    model = Lookup(variant.gain, variant.alike)
    replay = HardReplay(variant.replay, BATCH)
    schedule = RunSettings(warmup=WARMUP)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(PEAK, step, step / steps, schedule)
        words = pool.words[confusable(pool, BATCH, KEYS, variant.near, 0.0, 2, generator)]
        asked = torch.randint(KEYS, (BATCH,))
        replays = variant.replay > 0 and step >= steps // 4
        if replays:
            mixed = replay.mix(_as_batch(words, asked), "")
            words, asked = mixed.inputs, mixed.labels[:, 0]
        query = model(_asked(words, asked, variant.corrupt), "query")
        key = model(words, "key")
        size = key.detach().square().mean(dim=-1, keepdim=True).sqrt()
        key = key + variant.noise * size * torch.randn_like(key)
        scores = torch.einsum("bhd,bnhd->bhn", query, key) / HEAD_DIM**0.5
        scores = scores * (1 - (1 - variant.jitter) * torch.rand(BATCH, 1, 1))
        kept = torch.rand(BATCH, HEADS) >= variant.head_drop
        kept[torch.arange(BATCH), torch.randint(HEADS, (BATCH,))] = True
        share = (kept / kept.sum(dim=1, keepdim=True))[:, :, None]
        logits = model.gain * (entmax(scores, 1.5) * share).sum(dim=1)
        losses = nn.functional.cross_entropy(logits, asked, reduction="none")
        if replays:
            replay.update(losses.detach())
        loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def wrong_order(model: Lookup) -> float:
    """The share of a test pool's words that lose against the same letters in the other order, by the heads' vote."""
    pool = WordPool.drawn(POOL, Mqmtar.FIRST_LETTER, Mqmtar.LETTERS, torch.Generator().manual_seed(1))
    words = pool.words[pool.words[:, 0] != pool.words[:, 1]]
    keys = torch.stack([words, words.flip(1)], dim=1)
    scores = torch.einsum("bhd,bnhd->bhn", model(words, "query"), model(keys, "key")) / HEAD_DIM**0.5
    return round(float((entmax(scores, 1.5).mean(dim=1)[:, 0] <= 0.5).float().mean()), 5)


@torch.no_grad()
def test(model: Lookup, queries: int) -> dict[str, float]:
    """e among TEST_KEYS keys, for all heads and for one alone; the right key's mean score; `wrong_order`."""
    generator = torch.Generator().manual_seed(1)
    pool = WordPool.drawn(POOL, Mqmtar.FIRST_LETTER, Mqmtar.LETTERS, generator)
    together, alone, own = 0, 0, []
    for _ in range(0, queries, TEST_BATCH):
        words = pool.words[torch.randperm(POOL, generator=generator)[:TEST_KEYS]]
        asked = torch.randint(TEST_KEYS, (TEST_BATCH,), generator=generator)
        scores = torch.einsum("bhd,nhd->bhn", model(words[asked], "query"), model(words, "key")) / HEAD_DIM**0.5
        own.append(scores.gather(2, asked[:, None, None].expand(-1, HEADS, 1)).mean())
        best = scores.topk(64, dim=-1)  # the others have no weight beside them
        weights = entmax(best.values, 1.5).flatten(1)
        votes = torch.zeros(TEST_BATCH, TEST_KEYS).scatter_add_(1, best.indices.flatten(1), weights)
        together += int((votes.argmax(dim=1) != asked).sum())
        alone += int((best.indices[..., 0] != asked[:, None]).sum())
    return {
        "e": together / queries / TEST_KEYS,
        "e_of_one_head": alone / (queries * HEADS) / TEST_KEYS,
        "wrong": together,
        "score_of_the_right_key": round(float(torch.stack(own).mean()), 2),
        "wrong_order": wrong_order(model),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200, help="updates of 1,024 samples (default: 1200)")
    parser.add_argument("--queries", type=int, default=TEST_QUERIES, help="of a test (default: 6000)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parsed = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    header = results_header(torch.device("cpu"), parsed.seeds)
    cases = [(name, seed) for name in parsed.variants for seed in parsed.seeds]
    for name, seed in tqdm(cases, unit="run"):
        result = test(train(VARIANTS[name], seed, parsed.steps), parsed.queries)
        rows.append({"variant": name, "seed": seed, **asdict(VARIANTS[name]), **result})
        write_json(parsed.output, {**header, "steps": parsed.steps, "queries": parsed.queries, "rows": rows})
    print(
        f"e among {TEST_KEYS:,} keys, median of {len(parsed.seeds)} seeds (and range); of one head; right key's score; "
        "words that lose against their letters in the other order, %"
    )
    for name in parsed.variants:
        of_variant = [row for row in rows if row["variant"] == name]
        e = sorted(row["e"] for row in of_variant)
        single = statistics.median(row["e_of_one_head"] for row in of_variant)
        score = statistics.median(row["score_of_the_right_key"] for row in of_variant)
        order = statistics.median(row["wrong_order"] for row in of_variant)
        print(
            f"{name:70} {statistics.median(e):.1e} ({e[0]:.1e} to {e[-1]:.1e})  {single:.1e}  {score:5.1f}  "
            f"{100 * order:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
