"""Trains a small Llama-style language model on text with the attention you name, and prints its perplexity by length.

    sh recipes/pretrain/get_text.sh                                         the King James Bible, or use your own text
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention softmax
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention asentmax
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention softmax --positions nape
    python -m recipes.pretrain.perplexity runs/pretrain/softmax runs/pretrain/softmax-nape runs/pretrain/asentmax

    python -m recipes.pretrain.pretrain --dataset NAME --dataset-config CONFIG --bf16 ...     streams a Hub data set
    accelerate launch recipes/pretrain/pretrain.py ...                                        several GPUs

The checkpoint (model, tokenizer, training.json, held_out.txt) goes to runs/pretrain/ATTENTION. An interrupted run goes
on with --resume, with the losses it would have had.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

import hf_asentmax
from hf_asentmax import ASEntmaxConfig
from recipes import common
from recipes.pretrain import data
from recipes.pretrain.perplexity import HELD_OUT_FILE, TIMES, perplexity_by_length, report

ATTENTIONS = ("softmax", "asentmax", "entmax", "ssmax", "adaptive_temperature", "topk_softmax")
POSITIONS = ("model", "nape", "alibi", "nope")
TOKENIZER_TEXTS = 10_000  # of a streamed data set, at most, that the tokenizer is trained on


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_argument_group("text (one of --text and --dataset)")
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files")
    text.add_argument("--dataset", metavar="NAME", help="a Hub data set, streamed, or a folder of data files")
    text.add_argument("--dataset-config", metavar="NAME")
    text.add_argument("--dataset-column", default="text", metavar="NAME", help="the column of text (default text)")
    text.add_argument("--held-out", type=float, default=0.05, help="share of each file's end kept from training")
    text.add_argument("--held-out-texts", type=int, default=1000, help="a data set's first texts kept from training")
    text.add_argument("--vocab-size", type=int, default=2048, help="of the byte-level BPE (default 2048)")

    model = parser.add_argument_group("model")
    model.add_argument("--attention", choices=ATTENTIONS, default="asentmax", help="(default asentmax)")
    model.add_argument(
        "--positions", choices=POSITIONS, help="model: rotary, as Llama has them. Default: model for softmax, else nape"
    )
    model.add_argument("--length", type=int, default=128, help="tokens in a training block (default 128)")
    model.add_argument("--layers", type=int, default=4)
    model.add_argument("--hidden-size", type=int, default=128)
    model.add_argument("--heads", type=int, default=4)

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=1500, help="optimizer steps (default 1500)")
    training.add_argument("--batch-size", type=int, default=16, help="blocks in a batch on each device (default 16)")
    training.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="batches in a step")
    training.add_argument("--learning-rate", type=float, default=2e-3)
    training.add_argument("--warm-up", type=int, default=100, metavar="STEPS", help="then a cosine to a tenth")
    training.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; length scalings have none")
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16, weights stay float32")
    training.add_argument("--gradient-checkpointing", action="store_true")
    training.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="a state to resume from")
    training.add_argument("--stop-after", type=int, metavar="STEPS", help="save a state there and end, as if cut off")
    training.add_argument("--resume", action="store_true", help="go on from the last saved state in --out")
    training.add_argument("--out", type=Path, help="default: runs/pretrain/ATTENTION")
    training.add_argument("--eval-tokens", type=int, default=32768, help="of the held-out text (default 32768)")
    parsed = parser.parse_args(arguments)
    if (parsed.text is None) == (parsed.dataset is None):
        parser.error("give the text: either --text FILE ... or --dataset NAME")
    if parsed.positions is None:
        parsed.positions = "model" if parsed.attention == "softmax" else "nape"
    if parsed.out is None:
        name = parsed.attention if parsed.positions in ("model", "nape") else f"{parsed.attention}-{parsed.positions}"
        if parsed.attention == "softmax" and parsed.positions == "nape":
            name = "softmax-nape"
        parsed.out = common.REPOSITORY / "runs" / "pretrain" / name
    return parsed


def method_name(attention: str, positions: str) -> str:
    """What tables and plots call the model."""
    shown = {"softmax": "softmax", "asentmax": "ASEntmax", "entmax": "entmax", "ssmax": "SSMax"}
    where = {"model": "RoPE", "nape": "NAPE", "alibi": "ALiBi", "nope": "NoPE"}
    return f"{shown.get(attention, attention)} + {where[positions]}"


def build_model(arguments: argparse.Namespace, vocab_size: int, end_of_text: int) -> PreTrainedModel:
    """A Llama of the given size with the attention asked for; softmax with its own positions is stock transformers."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
        max_position_embeddings=arguments.length * TIMES[-1],
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    if arguments.attention == "softmax":
        if arguments.positions == "model":
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        config.asentmax = ASEntmaxConfig(alpha=1.0, scaling="none", positions=arguments.positions)
        return AutoModelForCausalLM.from_config(config, attn_implementation="asentmax")
    config.asentmax = {"positions": arguments.positions}
    return AutoModelForCausalLM.from_config(config, attn_implementation=arguments.attention)


def load_text(arguments: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, Any, list[str]]:
    """The tokenizer (trained on the text, or on --resume the saved one), blocks to train on, and held-out texts."""
    saved = arguments.out / "tokenizer.json"
    longest = arguments.length * TIMES[-1]
    if arguments.text:
        parts = [data.split_file(path, arguments.held_out) for path in arguments.text]
        train, held_out = [part[0] for part in parts], [part[1] for part in parts]
        tokenizer = (
            AutoTokenizer.from_pretrained(arguments.out)
            if arguments.resume and saved.exists()
            else data.train_tokenizer(train, arguments.vocab_size, longest)
        )
        return tokenizer, data.text_blocks(data.tokenize(train, tokenizer), arguments.length), held_out
    texts = data.stream_hub(arguments.dataset, arguments.dataset_config, arguments.dataset_column)
    skip = arguments.held_out_texts
    held_out = list(islice(texts(), skip))
    tokenizer = (
        AutoTokenizer.from_pretrained(arguments.out)
        if arguments.resume and saved.exists()
        else data.train_tokenizer(islice(texts(), skip, skip + TOKENIZER_TEXTS), arguments.vocab_size, longest)
    )
    return tokenizer, data.StreamedBlocks(texts, tokenizer, arguments.length, skip), held_out


def train(
    accelerator: Accelerator, model: PreTrainedModel, blocks: Any, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, list[float]]:
    """Train, from the saved state if asked to. Returns the model and the loss of each step since the start or state."""
    streamed = isinstance(blocks, data.StreamedBlocks)
    loader = DataLoader(blocks, batch_size=arguments.batch_size, shuffle=not streamed, drop_last=True)
    optimizer = torch.optim.AdamW(
        hf_asentmax.parameter_groups(model, arguments.weight_decay), lr=arguments.learning_rate, betas=(0.9, 0.95)
    )
    rest = max(1, arguments.steps - arguments.warm_up)

    def rate(step: int) -> float:
        if step < arguments.warm_up:
            return (step + 1) / arguments.warm_up
        return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - arguments.warm_up) / rest)))

    # counts optimizer steps on every device alike, so it isn't given to `prepare`
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    accelerator.register_for_checkpointing(schedule)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = arguments.out / "state"
    if arguments.resume:
        if not state.exists():
            raise SystemExit(f"there is no state to resume from in {arguments.out}")
        accelerator.load_state(str(state))
    first = schedule.last_epoch
    stop = min(arguments.steps, arguments.stop_after or arguments.steps)

    def batches() -> Any:
        done = first * arguments.gradient_accumulation
        per_epoch = None if streamed else len(loader)
        if per_epoch == 0:
            raise SystemExit(f"the text has fewer blocks than one batch of {arguments.batch_size}: give more text")
        epoch = 0 if per_epoch is None else done // per_epoch
        skip = done if per_epoch is None else done % per_epoch
        while True:
            loader.set_epoch(epoch)
            yield from accelerator.skip_first_batches(loader, skip) if skip else loader
            epoch, skip = epoch + 1, 0

    losses: list[float] = []
    model.train()
    source = batches()
    progress = tqdm(
        range(first, stop),
        initial=first,
        total=arguments.steps,
        desc=method_name(arguments.attention, arguments.positions),
        unit="step",
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        total = 0.0
        for part in range(arguments.gradient_accumulation):
            (tokens,) = next(source)
            # by hand and not `accumulate`, which also ends a step with each epoch of the data
            with accelerator.no_sync(model) if part + 1 < arguments.gradient_accumulation else nullcontext():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / arguments.gradient_accumulation
                accelerator.backward(loss)
            total += accelerator.reduce(loss.detach(), reduction="mean").item()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
        if not math.isfinite(total):
            raise SystemExit(f"the loss is {total} at step {step}: try a lower --learning-rate")
        recent = losses[-50:]
        progress.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}", refresh=False)
        if (step + 1) % arguments.save_every == 0 or step + 1 == stop:
            accelerator.save_state(str(state), safe_serialization=True)
    return accelerator.unwrap_model(model), losses


def main(command: list[str] | None = None) -> list[float]:
    arguments = parse_arguments(command)
    accelerator = Accelerator(
        mixed_precision="bf16" if arguments.bf16 else "no",
        cpu=arguments.cpu,
        # the order of an epoch depends on seed and epoch alone, so that a resumed run sees the same
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed),
    )
    set_seed(arguments.seed)
    header = common.results_header(accelerator.device, [arguments.seed])
    with accelerator.main_process_first():
        tokenizer, blocks, held_out = load_text(arguments)
    model = build_model(arguments, len(tokenizer), tokenizer.eos_token_id)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    name = method_name(arguments.attention, arguments.positions)
    size = "streamed" if arguments.dataset else f"{len(blocks) * arguments.length:,} tokens"
    accelerator.print(f"{name}: {model.num_parameters():,} parameters on {accelerator.device}; text: {size}")
    if accelerator.is_main_process:
        arguments.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(arguments.out)
        (arguments.out / HELD_OUT_FILE).write_text("\n".join(held_out), encoding="utf-8")

    started = time.perf_counter()
    model, losses = train(accelerator, model, blocks, arguments)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process or (arguments.stop_after or arguments.steps) < arguments.steps:
        return losses
    model.save_pretrained(arguments.out)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "resume", "text")}
    record: dict[str, Any] = {
        **header,
        "method": name,
        "parameters": model.num_parameters(),
        "text": [path.name for path in arguments.text or []],
        "settings": settings,
        "tokens_seen": arguments.steps
        * arguments.gradient_accumulation
        * arguments.batch_size
        * arguments.length
        * accelerator.num_processes,
        "seconds": round(seconds, 1),
        "train_loss": sum(losses[-50:]) / max(1, len(losses[-50:])),
    }
    common.write_json(arguments.out / "training.json", record)

    tokens = data.tokenize(held_out, tokenizer)[: arguments.eval_tokens]
    lengths = [arguments.length * times for times in TIMES]
    if len(tokens) < lengths[-1]:
        print(f"The held-out text has {len(tokens)} tokens, too few for windows of {lengths[-1]}: nothing to measure")
        return losses
    results = perplexity_by_length(model, tokens, lengths, last=arguments.length // 2)
    print("\n" + report({name: results}, arguments.length))
    print(f"\nSaved model, tokenizer and training.json in {arguments.out}. Compare checkpoints with perplexity.py.")
    return losses


if __name__ == "__main__":
    main()
