"""Queries, keys and values of a model trained by the synthetic recipe, at a long length, for attention.py --captured.

    python -m recipes.synthetic.train --task mqmtar --steps 0 --minutes 1.5 --corrupt 0.5 --jitter 0.4 --compile
    python -m recipes.benchmark.capture runs/synthetic/mqmtar-asentmax-nape/seed0 --length 32768 --out runs/captured.pt
    python -m recipes.benchmark.attention --captured runs/captured.pt

The tensors are those of one test sample in one layer, as the attention function gets them: queries carry ASEntmax's
scaling. The file holds query, key, value (1, heads, length, head_dim) in bfloat16 and alibi_slopes (heads,) or None.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from recipes.recording import recorded_attention
from recipes.synthetic.evaluate import task_of
from recipes.synthetic.measuring import autocast, fixed_batches
from recipes.synthetic.models import load_model, outputs_at


@torch.inference_mode()
def capture(run: Path, length: int, layer: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The tensors of one layer for one test sample whose source has about `length` tokens."""
    model = load_model(run / "model").to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
    task = task_of(json.loads((run / "run.json").read_text()))
    batch = next(iter(fixed_batches(task, length, 1, 1, seed=0))).to(device)
    with recorded_attention() as calls, autocast(task, device):
        outputs_at(model, batch)
    call = calls[layer]
    slopes = call.options.get("alibi_slopes")
    return {
        "query": call.query.bfloat16().cpu(),
        "key": call.key.bfloat16().cpu(),
        "value": call.value.bfloat16().cpu(),
        "alibi_slopes": None if slopes is None else slopes.float().cpu(),
    }


def main() -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of one seed's run, with run.json and model/")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the sample")
    parser.add_argument("--layer", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=Path("runs/captured.pt"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = capture(arguments.run, arguments.length, arguments.layer, device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, arguments.out)
    print({name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()})


if __name__ == "__main__":
    main()
