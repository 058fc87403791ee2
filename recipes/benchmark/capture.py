"""Saves the queries, keys and values of a trained model of the synthetic recipe, as inputs of attention.py.

    python -m recipes.benchmark.capture runs/synthetic/mqmtar-asentmax-nape/seed0 --length 32768 --out runs/mqmtar.pt
    python -m recipes.benchmark.attention --captured runs/mqmtar.pt

They are those of one layer for one test sample, as the attention function gets them: queries carry ASEntmax's scaling.
The file holds query, key and value, (1, heads, length, head_dim) in bfloat16, and alibi_slopes, (heads,) or None.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.common import default_device, read_json
from recipes.recording import recorded_attention
from recipes.synthetic.evaluate import task_of
from recipes.synthetic.measuring import autocast, fixed_batches
from recipes.synthetic.models import load_model, outputs_at


@torch.inference_mode()
def capture(run: Path, length: int, layer: int, device: torch.device) -> dict[str, torch.Tensor | None]:
    """The tensors of one layer for one test sample of about `length` tokens.

    Args:
        run: folder of one seed's run, with run.json and model/.
        length: tokens of the sample.
        layer: number of the layer; -1 is the last.
        device: where the model runs.
    """
    model = load_model(run / "model").to(device)  # type: ignore[arg-type]  # transformers wraps Module.to
    task = task_of(read_json(run / "run.json"))
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


def main(command: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of one seed's run, with run.json and model/")
    parser.add_argument("--length", type=int, default=32768, help="tokens of the sample (default 32768)")
    parser.add_argument("--layer", type=int, default=-1, help="number of the layer (default: the last)")
    parser.add_argument("--out", type=Path, default=Path("runs/captured.pt"))
    arguments = parser.parse_args(command)
    tensors = capture(arguments.run, arguments.length, arguments.layer, default_device())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, arguments.out)
    print({name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()})


if __name__ == "__main__":
    main()
