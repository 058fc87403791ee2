"""Would bounds on pages of keys let a decoding step leave out keys? Counted on the CPU, for exact attention.

    python recipes/benchmark/page_bounds.py                                   # random and topical keys
    python recipes/benchmark/page_bounds.py --models runs/quickstart/checkpoint runs/pretrain/asentmax

A page's box, the least and the largest of its keys in each channel, bounds its scores:

    q k <= sum_d max(q_d low_d, q_d high_d)

and its ball, the mean m and the largest distance r from it, bounds them by q m + |q| r. In scores times alpha - 1, a
page has no weight if its bound is at most max - 1, or at most tau. Neither is known before the keys are read: what is
counted is an upper limit of what a kernel could leave out. A group's heads share their keys, so a page is left out
where none of them needs it. For a head with ALiBi the bound is lowered by the slope times the distance to the page's
last key. The keys' bytes are 1: a step reads the bounds, 2 / page of them for a box and (1 + 1 / head_dim) / page for a
ball, and the pages that are left.

A model's keys and queries are those of its own attention over one text of --length tokens, each layer for itself:
held_out.txt where its folder has one, else a stream of the quickstart's task. Steps are the last 64 positions of it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from hf_asentmax.mappings import entmax
from recipes.common import format_table, results_header, write_json
from recipes.recording import recorded_attention

PAGES = (16, 64, 128)
TOPIC = 256  # keys that share a direction, as in attention.py
STEPS = 64
_ALPHA = 1.5


def _upper_bounds(query: torch.Tensor, key: torch.Tensor, page: int, kind: str) -> torch.Tensor:
    """(steps, pages): at least q k for every key of a page. query (steps, head_dim), key (kv_len, head_dim)."""
    pages = key.unflatten(0, (-1, page))
    if kind == "box":
        return query.clamp(min=0) @ pages.amax(1).T + query.clamp(max=0) @ pages.amin(1).T
    centre = pages.mean(1)
    radius = (pages - centre[:, None]).norm(dim=-1).amax(1)
    return query @ centre.T + query.norm(dim=-1)[:, None] * radius


def read_shares(query: torch.Tensor, key: torch.Tensor, scale: float, slopes: torch.Tensor) -> Iterator[dict[str, Any]]:
    """What steps of one group would read, in keys' bytes.

    Args:
        query: (heads of the group, steps, head_dim), the last `steps` positions.
        key: (kv_len, head_dim), kv_len a multiple of every page.
        scale: of the scores.
        slopes: (heads of the group,) ALiBi slopes, 0 for none.
    """
    heads, steps, head_dim = query.shape
    kv_len = key.shape[0]
    positions = torch.arange(kv_len - steps, kv_len)
    distance = positions[:, None] - torch.arange(kv_len)
    factor = _ALPHA - 1.0
    scores = scale * query @ key.T - slopes[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -math.inf) * factor
    weights = entmax(scores / factor, _ALPHA)
    support = (weights > 0).sum(-1).float().mean().item()
    excess = scores - weights.sqrt()  # tau, on the support
    tau = excess.masked_fill(weights == 0, -math.inf).amax(-1)
    thresholds = {"max - 1": scores.amax(-1) - 1.0, "tau": tau}
    for page in PAGES:
        last = torch.arange(page - 1, kv_len, page)
        nearest = (positions[:, None] - last).clamp(min=0)
        with_support = (weights > 0).unflatten(-1, (-1, page)).any(-1).any(0).float().mean().item()
        for kind, bound_bytes in (("box", 2.0 / page), ("ball", (1.0 + 1.0 / head_dim) / page)):
            bounds = torch.stack(
                [
                    factor * (scale * _upper_bounds(query[head], key, page, kind) - slopes[head] * nearest)
                    for head in range(heads)
                ]
            )
            row: dict[str, Any] = {"page": page, "bound": kind, "support": support, "pages_with_support": with_support}
            for name, threshold in thresholds.items():
                needed = (bounds > threshold[..., None]).any(0).float().mean().item()
                row[f"pages_read, {name}"] = needed
                row[f"bytes_read, {name}"] = needed + bound_bytes
            yield row


def made_groups(kind: str, heads: int, head_dim: int, kv_len: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(query, key) of four groups of random or topical keys, the latter as attention.py makes them."""
    for _ in range(4):
        query, key = torch.randn(heads, STEPS, head_dim), torch.randn(kv_len, head_dim)
        if kind == "topical":
            topics = F.normalize(torch.randn(kv_len // TOPIC, head_dim), dim=-1) * math.sqrt(head_dim)
            key = 0.5 * key + topics.repeat_interleave(TOPIC, 0)
            query = (0.5 * query + topics[torch.randint(len(topics), (heads, STEPS))]) * 2
        yield query, key


def model_layers(folder: Path, length: int) -> list[dict[str, Any]]:
    """Queries (heads, length, head_dim), keys (kv_heads, length, head_dim), scale and slopes of each layer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = folder / "held_out.txt"
    if text.exists():
        ids = AutoTokenizer.from_pretrained(folder)(text.read_text()[: 16 * length], return_tensors="pt").input_ids
        ids = ids[:, :length]
    else:
        from recipes.quickstart.task import sample_batch

        ids = sample_batch(1, length, STEPS // 2, torch.Generator().manual_seed(0)).tokens
    with recorded_attention() as calls:
        model.base_model(ids, use_cache=False)
    assert all(call.options["alpha"] == _ALPHA for call in calls)
    return [
        {"query": call.query[0], "key": call.key[0], "scale": call.options["scale"], "slopes": call.slopes}
        for call in calls
    ]


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several for the same page and bound: numbers are averaged."""
    return {
        name: value if isinstance(value, (int, str)) else round(sum(row[name] for row in rows) / len(rows), 4)
        for name, value in rows[0].items()
    }


def mean_rows(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each page and bound."""
    for page in PAGES:
        for kind in ("box", "ball"):
            yield _mean([row for row in rows if row["page"] == page and row["bound"] == kind])


def evaluate(models: list[Path], length: int) -> Iterator[dict[str, Any]]:
    """Rows of all inputs; a model's heads with ALiBi and its others apart."""
    for kind in ("random", "topical"):
        for heads, head_dim, kv_len in ((4, 128, 32768), (1, 64, 32768)):
            groups = made_groups(kind, heads, head_dim, kv_len)
            rows = [row for query, key in groups for row in read_shares(query, key, head_dim**-0.5, torch.zeros(heads))]
            for row in mean_rows(rows):
                yield {"input": kind, "heads": f"{heads}/1 x {head_dim}", "keys": kv_len, **row}
    for folder in models:
        layers = model_layers(folder, length)
        found: dict[str, list[dict[str, Any]]] = {}
        for number, layer in enumerate(layers):
            for key, group, slopes in zip(
                layer["key"],
                layer["query"][:, -STEPS:].unflatten(0, (layer["key"].shape[0], -1)),
                layer["slopes"].unflatten(0, (layer["key"].shape[0], -1)),
                strict=True,
            ):
                name = f"layer {number}, {'ALiBi' if slopes.any() else 'NoPE'} heads"
                found.setdefault(name, []).extend(read_shares(group, key, layer["scale"], slopes))
        for name, rows in sorted(found.items()):
            for row in mean_rows(rows):
                yield {"input": f"{folder.parent.name}/{folder.name}: {name}", "heads": "", "keys": length, **row}


@torch.no_grad()
def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="folders of models with ASEntmax")
    parser.add_argument("--length", type=int, default=1024, help="tokens that a model sees, a multiple of 128")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("page_bounds.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    header = results_header(torch.device("cpu"), [0])
    rows = list(evaluate(arguments.models, arguments.length))
    write_json(arguments.output, {**header, "results": rows})
    columns = list(rows[0])
    print(format_table(columns, [[str(row[name]) for name in columns] for row in rows]))


if __name__ == "__main__":
    main()
