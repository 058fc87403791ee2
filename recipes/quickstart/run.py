"""Trains tiny models on associative recall with at most 64 tokens, and tests them with up to 1,024.

    python -m recipes.quickstart.run            takes a few minutes on 2 CPU cores
    python -m recipes.quickstart.run --help

The three models have the same size (Llama's architecture, built by transformers), the same number of steps, the same
optimizer and the same rule for the training data. They differ in the attention:

    softmax + RoPE     stock Llama
    softmax + NAPE     softmax with the positions of ASEntmax
    ASEntmax + NAPE    the method of this package

The model with RoPE fails beyond the training length. Softmax + NAPE, with the best of its learning rates, is as good as
ASEntmax + NAPE at these lengths (learning_rates.json has all rates). The tables, the figure, the numbers and the
checkpoint of ASEntmax go to runs/quickstart/.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import hf_asentmax
from hf_asentmax import ASEntmaxConfig
from recipes import common, metrics
from recipes.quickstart import report
from recipes.quickstart.task import START, WORDS, Batch, build_tokenizer, num_pairs, sample_batch

SHORTEST, TRAIN_LENGTH = 8, 64
TIMES = (1, 2, 4, 8, 16)  # tested lengths over the training length
QUERIES = 8  # of a test stream; a training stream has a random number of them
OURS = "ASEntmax + NAPE"

# (attn_implementation, flags, the best of three learning rates: see learning_rates.json)
METHODS: dict[str, tuple[str, ASEntmaxConfig | None, float]] = {
    "softmax + RoPE": ("sdpa", None, 6e-3),
    "softmax + NAPE": ("asentmax", ASEntmaxConfig(alpha=1.0, scaling="none", positions="nape"), 6e-3),
    OURS: ("asentmax", ASEntmaxConfig(alpha=1.5, scaling="asentmax", positions="nape"), 3e-3),
}


def build_model(method: str) -> Any:
    """An untrained Llama with 2 layers, the fewest that can find an earlier copy of a token and read the next one."""
    implementation, flags, _ = METHODS[method]
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # one head has to tell 676 keys apart
        max_position_embeddings=TRAIN_LENGTH * TIMES[-1],
        initializer_range=0.1,  # about 1/sqrt(hidden_size); with the usual 0.02, for wide models, nothing is learnt
        bos_token_id=START,
        eos_token_id=None,
    )
    if flags is not None:
        config.asentmax = flags
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        # Adam moves every number by about the learning rate, which is little for embeddings of this size
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        # With small scores entmax gives every key a weight at the start, and so a gradient, as softmax always does
        for layer in model.base_model.layers:
            layer.self_attn.q_proj.weight.mul_(0.3)
    return model


def answer_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of the token after each query's key, (batch, queries, vocabulary)."""
    hidden_states = model.base_model(batch.tokens, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden_states[:, batch.answers_at - 1])


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of the batch on `device`."""
    return Batch(batch.tokens.to(device), batch.answers_at.to(device))


def training_batch(longest: int, batch_size: int, generator: torch.Generator) -> Batch:
    """Streams of one random length up to `longest`, with a random number of queries, at most one for every pair."""
    length = 2 * int(torch.randint(SHORTEST // 2, longest // 2 + 1, (), generator=generator))
    queries = int(torch.randint(1, (length - 2) // 4 + 1, (), generator=generator))
    return sample_batch(batch_size, length, queries, generator)


def train(
    model: PreTrainedModel, method: str, learning_rate: float, steps: int, batch_size: int, seed: int
) -> tuple[float, float]:
    """Trains with AdamW. The rate rises over the first tenth of the steps, and falls to zero over the last half.

    Streams have at most 16 tokens at first. Whenever nine answers in ten are right, a step adds 2 tokens, up to 64.

    Returns:
        The mean loss of the last 50 steps, and the seconds.
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
        loss_now, accuracy = (sum(values[-20:]) / len(values[-20:]) for values in (losses, accuracies))
        if accuracy >= 0.9 and longest < TRAIN_LENGTH:
            longest += 2
        state = f"up to {longest} tokens, loss {loss_now:.3f}, accuracy {accuracy:.1%}"
        progress.set_postfix_str(state, refresh=False)
    return sum(losses[-50:]) / len(losses[-50:]), time.perf_counter() - started


@torch.no_grad()
def evaluate(model: PreTrainedModel, length: int, num_streams: int) -> float:
    """The share of right answers in `num_streams` streams, which are the same for every model."""
    streams = sample_batch(num_streams, length, QUERIES, torch.Generator().manual_seed(1_000_000 + length))
    model.eval()
    metric = metrics.load("answer_accuracy")
    at_once = max(1, (1024 if model.device.type == "cpu" else 65536) // length)  # small parts fit in a CPU's cache
    for tokens in streams.tokens.split(at_once):
        batch = to_device(Batch(tokens, streams.answers_at), model.device)
        answers = answer_logits(model, batch).argmax(-1)
        metric.add_batch(predictions=answers.flatten().tolist(), references=batch.answers.flatten().tolist())
    return float(metric.compute()["accuracy"])


@torch.no_grad()
def keys_in_use(model: PreTrainedModel, length: int, num_streams: int = 4) -> float:
    """How many keys get any weight from a query of the last layer: the mean over queries, of the head with the most."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # the same attention, but it returns its weights
    streams = sample_batch(num_streams, length, QUERIES, torch.Generator().manual_seed(2_000_000 + length))
    batch = to_device(streams, model.device)
    model.eval()
    weights = model(batch.tokens, use_cache=False, output_attentions=True).attentions[-1]
    counts = (weights[:, :, batch.answers_at - 1] > 0).sum(-1).float()
    return float(counts.mean(dim=(0, 2)).max())


def show_answers(checkpoint: Path, device: torch.device) -> None:
    """Reloads the checkpoint as a user would, and lets it answer one query at 1x and one at 16x the training length."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    print(f"\nReloaded {checkpoint} with AutoModelForCausalLM.from_pretrained: {model.config.asentmax}")
    for length in (TRAIN_LENGTH, TRAIN_LENGTH * TIMES[-1]):
        tokens = sample_batch(1, length, 1, torch.Generator().manual_seed(length)).tokens[0]
        prompt, truth = str(tokenizer.decode(tokens[:-1])), tokenizer.decode(tokens[-1:])
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        output = model.generate(**inputs.to(device), max_new_tokens=1, do_sample=False, pad_token_id=START)
        answer = tokenizer.decode(output[0, -1:])
        words = prompt.split()
        found = words.index(words[-1])
        print(
            f"\n  {num_pairs(length, 1)} pairs, {length} tokens:\n"
            f"    prompt  {' '.join(words[:9])} ... [{words[found]} {words[found + 1]}] ... "
            f"{' '.join(words[-4:])}\n"
            f"    answer  {answer}   ({'right' if answer == truth else f'wrong, it is {truth}'})"
        )


def train_and_test(method: str, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one model, and tests it at every length. The first seed of ASEntmax saves its checkpoint.

    Returns:
        The run's entry in the results file.
    """
    torch.manual_seed(seed)
    model = build_model(method).to(arguments.device)
    loss, seconds = train(model, method, rate, arguments.steps, arguments.batch_size, seed)
    lengths = [TRAIN_LENGTH * times for times in TIMES]
    bar = tqdm(lengths, desc="  testing", unit="length", leave=False, dynamic_ncols=True)
    accuracy = {str(length): evaluate(model, length, arguments.streams) for length in bar}
    if method == OURS and seed == arguments.seeds[0]:
        model.save_pretrained(arguments.out / "checkpoint")
        build_tokenizer().save_pretrained(arguments.out / "checkpoint")
    return {
        "method": method,
        "learning_rate": rate,
        "seed": seed,
        "train_loss": loss,
        "train_seconds": round(seconds, 1),
        "accuracy": accuracy,
        "keys_in_use": {str(length): round(keys_in_use(model, length), 1) for length in lengths},
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training, for each model (default 800)")
    parser.add_argument("--batch-size", type=int, default=128, help="streams in a step (default 128)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default 0)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", help="one run for each (default: the best rate of each method)"
    )
    parser.add_argument("--streams", type=int, default=64, help="tested at each length, 8 queries each (default 64)")
    parser.add_argument("--device", type=torch.device, default=common.default_device(), help="default: a GPU if any")
    parser.add_argument("--out", type=Path, default=common.REPOSITORY / "runs" / "quickstart", help="where to write")
    return parser.parse_args(arguments)


def main(command: list[str] | None = None) -> None:
    """Runs the recipe; see the module's description."""
    arguments = parse_arguments(command)
    header = common.results_header(arguments.device, arguments.seeds)
    parameters = {method: build_model(method).num_parameters() for method in arguments.methods}
    print(f"Associative recall, {SHORTEST} to {TRAIN_LENGTH} tokens in training, on {arguments.device}. Parameters:")
    print("  " + ", ".join(f"{method} {count:,}" for method, count in parameters.items()))
    runs = [
        train_and_test(method, rate, seed, arguments)
        for method in arguments.methods
        for rate in arguments.learning_rates or [METHODS[method][2]]
        for seed in arguments.seeds
    ]
    content = {
        **header,
        "task": "associative recall",
        "train_lengths": [SHORTEST, TRAIN_LENGTH],
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "streams_per_length": arguments.streams,
        "queries_per_stream": QUERIES,
        "parameters": parameters,
        "runs": runs,
    }
    print("\n" + report.summary(content))
    common.write_json(arguments.out / "results.json", content)
    report.figure(content, arguments.out / "results.png")
    print(f"\nWrote results.json and results.png in {arguments.out}")
    if OURS in arguments.methods:
        show_answers(arguments.out / "checkpoint", arguments.device)


if __name__ == "__main__":
    main()
