"""Trains tiny models on associative recall at up to 64 tokens, and asks them at up to 1,024.

    python recipes/quickstart/run.py            a few minutes on 2 CPU cores
    python recipes/quickstart/run.py --help

Three models of the same size (Llama-style, through transformers), steps, optimizer and rule for the training data:
softmax with rotary positions, as Llama has it; softmax with NAPE, which differs from ours in the attention alone;
and ASEntmax with NAPE. What to expect: rotary positions fail beyond the training length; softmax with NAPE, at its own
best learning rate, keeps up with ASEntmax at these lengths (learning_rates.json). The table, the plot, the numbers and
the ASEntmax checkpoint go to runs/quickstart/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hf_asentmax
from hf_asentmax import ASEntmaxConfig
from recipes import common
from recipes.quickstart.task import FIRST_VALUE, START, WORDS, Batch, build_tokenizer, num_pairs, sample_batch

SHORTEST, TRAIN_LENGTH = 8, 64
TIMES = (1, 2, 4, 8, 16)
QUERIES = 8  # of a stream in evaluation; training draws how many
OURS = "ASEntmax + NAPE"

# name -> (attn_implementation, flags, learning rate: each one's best of three, see learning_rates.json)
METHODS: dict[str, tuple[str, ASEntmaxConfig | None, float]] = {
    "softmax + RoPE": ("sdpa", None, 6e-3),
    "softmax + NAPE": ("asentmax", ASEntmaxConfig(alpha=1.0, scaling="none", positions="nape"), 6e-3),
    OURS: ("asentmax", ASEntmaxConfig(alpha=1.5, scaling="asentmax", positions="nape"), 3e-3),
}


def build_model(method: str) -> Any:
    """A Llama of 2 layers: the smallest that can look up the token after an earlier copy of this one."""
    implementation, flags, _ = METHODS[method]
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # 676 keys must be told apart in one head
        max_position_embeddings=TRAIN_LENGTH * TIMES[-1],
        initializer_range=0.1,  # about 1/sqrt(hidden_size); the usual 0.02 is meant for wide models and stays at chance
        bos_token_id=START,
        eos_token_id=None,
    )
    if flags is not None:
        config.asentmax = flags
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        # Adam moves every number by about the learning rate: in rows of size 1, keys stay what they are
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        # Small scores at the start: every key then gets a gradient from entmax too, as it always does from softmax
        for layer in model.base_model.layers:
            layer.self_attn.q_proj.weight.mul_(0.3)
    return model


def answer_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The scores of the next token at each query's key: (batch, queries, vocabulary)."""
    hidden_states = model.base_model(batch.tokens, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden_states[:, batch.answers_at - 1])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch elsewhere."""
    return Batch(batch.tokens.to(device), batch.answers_at.to(device))


def training_batch(longest: int, batch_size: int, generator: torch.Generator) -> Batch:
    """Streams of one length, drawn up to `longest`, with as many queries as drawn, at most one for every pair."""
    length = 2 * int(torch.randint(SHORTEST // 2, longest // 2 + 1, (), generator=generator))
    queries = int(torch.randint(1, (length - 2) // 4 + 1, (), generator=generator))
    return sample_batch(batch_size, length, queries, generator)


def train(
    model: PreTrainedModel, method: str, learning_rate: float, steps: int, batch_size: int, seed: int
) -> tuple[float, float]:
    """Train with AdamW, a warm-up of a tenth, then linearly to zero over the last half.

    Short streams first: the longest has 16 tokens, and once nine answers in ten are right, 2 more at each step, up to
    64. The rule is the same for every method.

    Returns:
        The loss of the last 50 steps, and the seconds.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(hf_asentmax.parameter_groups(model), lr=learning_rate, betas=(0.9, 0.99))
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up, 2.0 * (1.0 - step / steps))
    )
    longest, losses, accuracies = 16, [], []
    model.train()
    started = time.perf_counter()
    progress = tqdm(range(steps), desc=f"{method:<16}", unit="step", dynamic_ncols=True)
    for _ in progress:
        batch = to_device(training_batch(longest, batch_size, generator), model.device)
        logits = answer_logits(model, batch)
        loss = cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        accuracies.append((logits.argmax(-1) == batch.answers).float().mean().item())
        accuracy = sum(accuracies[-20:]) / len(accuracies[-20:])
        if accuracy >= 0.9 and longest < TRAIN_LENGTH:
            longest += 2
        recent = losses[-20:]
        progress.set_postfix_str(
            f"up to {longest} tokens, loss {sum(recent) / len(recent):.3f}, accuracy {accuracy:.1%}", refresh=False
        )
    return sum(losses[-50:]) / len(losses[-50:]), time.perf_counter() - started


@torch.no_grad()
def evaluate(model: PreTrainedModel, length: int, num_streams: int) -> float:
    """The share of right answers in `num_streams` streams, the same ones for every model."""
    streams = sample_batch(num_streams, length, QUERIES, torch.Generator().manual_seed(1_000_000 + length))
    model.eval()
    right = 0
    at_once = max(1, (1024 if model.device.type == "cpu" else 65536) // length)  # small parts stay in a CPU's cache
    for tokens in streams.tokens.split(at_once):
        batch = to_device(Batch(tokens, streams.answers_at), model.device)
        right += int((answer_logits(model, batch).argmax(-1) == batch.answers).sum())
    return right / (num_streams * QUERIES)


@torch.no_grad()
def keys_in_use(model: PreTrainedModel, length: int, num_streams: int = 4) -> float:
    """How many keys a query of the last layer gives any weight, on average over its heads with the most."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # the same attention, which can return its weights
    streams = sample_batch(num_streams, length, QUERIES, torch.Generator().manual_seed(2_000_000 + length))
    batch = to_device(streams, model.device)
    model.eval()
    weights = model(batch.tokens, use_cache=False, output_attentions=True).attentions[-1]
    counts = (weights[:, :, batch.answers_at - 1] > 0).sum(-1).float()
    return float(counts.mean(dim=(0, 2)).max())


def show_answers(checkpoint: Path, device: torch.device) -> None:
    """Reload the checkpoint as any user would, and let it answer queries in streams of 1x and 16x."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    print(f"\nReloaded {checkpoint.name} with AutoModelForCausalLM.from_pretrained: {model.config.asentmax}")
    for length in (TRAIN_LENGTH, TRAIN_LENGTH * TIMES[-1]):
        tokens = sample_batch(1, length, 1, torch.Generator().manual_seed(length)).tokens[0]
        prompt, truth = str(tokenizer.decode(tokens[:-1])), tokenizer.decode(tokens[-1:])
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        output = model.generate(**inputs.to(device), max_new_tokens=1, do_sample=False, pad_token_id=START)
        answer = tokenizer.decode(output[0, -1:])
        words = prompt.split()
        found = words.index(words[-1])
        around = "" if found == 1 else "... "
        print(
            f"\n  {num_pairs(length, 1)} pairs, {length} tokens:\n"
            f"    prompt  {' '.join(words[:9])} ... {around}[{words[found]} {words[found + 1]}] ... "
            f"{' '.join(words[-4:])}\n"
            f"    answer  {answer}   ({'right' if answer == truth else f'wrong, it is {truth}'})"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training, for each model (default 800)")
    parser.add_argument("--batch-size", type=int, default=128, help="streams in a step (default 128)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default 0)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", help="train with each of these, in place of each method's own"
    )
    parser.add_argument("--streams", type=int, default=64, help="evaluated at each length, 8 queries each (default 64)")
    parser.add_argument("--device", type=torch.device, default=common.default_device(), help="default: a GPU if any")
    parser.add_argument("--out", type=Path, default=common.REPOSITORY / "runs" / "quickstart", help="where to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    header = common.results_header(arguments.device, arguments.seeds)
    lengths = [TRAIN_LENGTH * times for times in TIMES]
    parameters = {method: build_model(method).num_parameters() for method in arguments.methods}
    print(f"Associative recall, {SHORTEST} to {TRAIN_LENGTH} tokens in training, on {arguments.device}. Parameters:")
    print("  " + ", ".join(f"{method} {count:,}" for method, count in parameters.items()))

    runs: list[dict[str, Any]] = []
    for method in arguments.methods:
        for rate in arguments.learning_rates or [METHODS[method][2]]:
            for seed in arguments.seeds:
                torch.manual_seed(seed)
                model = build_model(method).to(arguments.device)
                loss, seconds = train(model, method, rate, arguments.steps, arguments.batch_size, seed)
                bar = tqdm(lengths, desc="  evaluating", unit="length", leave=False, dynamic_ncols=True)
                accuracy = {str(length): evaluate(model, length, arguments.streams) for length in bar}
                runs.append(
                    {
                        "method": method,
                        "learning_rate": rate,
                        "seed": seed,
                        "train_loss": loss,
                        "train_seconds": round(seconds, 1),
                        "accuracy": accuracy,
                        "keys_in_use": {str(length): round(keys_in_use(model, length), 1) for length in lengths},
                    }
                )
                if method == OURS and seed == arguments.seeds[0]:
                    model.save_pretrained(arguments.out / "checkpoint")
                    build_tokenizer().save_pretrained(arguments.out / "checkpoint")

    several_rates = len(arguments.learning_rates or []) > 1
    right: dict[str, list[list[float]]] = {}
    in_use: dict[str, list[list[float]]] = {}
    for run in runs:
        name = f"{run['method']}, rate {run['learning_rate']:g}" if several_rates else run["method"]
        right.setdefault(name, []).append([100 * run["accuracy"][str(length)] for length in lengths])
        in_use.setdefault(name, []).append([run["keys_in_use"][str(length)] for length in lengths])
    answered = arguments.streams * QUERIES
    of_seeds = "1 seed" if len(arguments.seeds) == 1 else f"mean of {len(arguments.seeds)} seeds"
    for title, values in (
        (
            f"right answers in %, chance {100 / (len(WORDS) - FIRST_VALUE):.0f}; {answered} queries at each length",
            right,
        ),
        ("keys that a query of the last layer gives any weight, in its head with the most", in_use),
    ):
        rows = [
            [name, *(f"{sum(column) / len(column):.1f}" for column in zip(*seeds, strict=True))]
            for name, seeds in values.items()
        ]
        print(f"\n{title}; {of_seeds}\n")
        print(common.format_table(["tokens", *(f"{n} ({n // TRAIN_LENGTH}x)" for n in lengths)], rows))

    common.write_json(
        arguments.out / "results.json",
        {
            **header,
            "task": "associative recall",
            "train_lengths": [SHORTEST, TRAIN_LENGTH],
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "streams_per_length": arguments.streams,
            "queries_per_stream": QUERIES,
            "parameters": parameters,
            "runs": runs,
        },
    )
    figure, (of_answers, of_keys) = common.length_axes(TRAIN_LENGTH, lengths, panels=2)
    common.plot_lengths(of_answers, right, lengths)
    of_answers.set_ylabel("right answers (%)")
    of_answers.set_ylim(-3, 103)
    of_answers.set_title("Associative recall, trained on at most 64 tokens", loc="left", fontsize=11, pad=14)
    common.plot_lengths(of_keys, in_use, lengths)
    of_keys.set_yscale("log")
    of_keys.set_ylabel("keys with any weight")
    of_keys.set_title("How many keys a query of the last layer looks at", loc="left", fontsize=11, pad=14)
    common.save_figure(figure, arguments.out / "results.png")
    saved_model = " and the ASEntmax checkpoint" if OURS in arguments.methods else ""
    print(f"\nSaved results.json, results.png{saved_model} in {arguments.out}")
    if OURS in arguments.methods:
        show_answers(arguments.out / "checkpoint", arguments.device)


if __name__ == "__main__":
    main()
