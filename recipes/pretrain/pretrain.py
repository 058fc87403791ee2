"""Trains a small Llama-style language model on text with the attention that you name, and prints its perplexity.

    sh recipes/pretrain/get_text.sh      fetches the King James Bible; any text files of your own do as well
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention softmax
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention asentmax
    python -m recipes.pretrain.pretrain --text runs/text/kjv.txt --attention softmax --positions nape
    python -m recipes.pretrain.perplexity runs/pretrain/softmax runs/pretrain/softmax-nape runs/pretrain/asentmax

    python -m recipes.pretrain.pretrain --dataset NAME --dataset-config CONFIG --bf16     streams a data set of the Hub
    accelerate launch -m recipes.pretrain.pretrain --text FILE                            trains on several GPUs

The checkpoint goes to runs/pretrain/ATTENTION: the model, the tokenizer, training.json and held_out.txt. With --resume
an interrupted run continues, and has the same losses as one that was not interrupted.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_asentmax import ASEntmaxConfig
from recipes import common
from recipes.pretrain import data
from recipes.pretrain.perplexity import HELD_OUT_FILE, TIMES, perplexity_by_length, report
from recipes.pretrain.training import train

ATTENTIONS = {
    "softmax": "softmax",
    "asentmax": "ASEntmax",
    "entmax": "entmax",
    "ssmax": "SSMax",
    "adaptive_temperature": "adaptive temperature",
    "topk_softmax": "top-k softmax",
}
POSITIONS = {"model": "RoPE", "nape": "NAPE", "alibi": "ALiBi", "nope": "NoPE"}
TOKENIZER_TEXTS = 10_000  # the tokenizer of a streamed data set is trained on at most so many texts


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_argument_group("text (one of --text and --dataset)")
    text.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text files")
    text.add_argument("--dataset", metavar="NAME", help="a data set of the Hub, streamed, or a folder of data files")
    text.add_argument("--dataset-config", metavar="NAME")
    text.add_argument("--dataset-column", default="text", metavar="NAME", help="the column of text (default text)")
    text.add_argument("--held-out", type=float, default=0.05, help="share of each file, at its end, to test on")
    text.add_argument("--held-out-texts", type=int, default=1000, help="first texts of a data set, to test on")
    text.add_argument("--vocab-size", type=int, default=2048, help="of the byte-level BPE (default 2048)")

    model = parser.add_argument_group("model")
    model.add_argument("--attention", choices=ATTENTIONS, default="asentmax", help="(default asentmax)")
    model.add_argument(
        "--positions", choices=POSITIONS, help="model is RoPE, as in Llama (default: model for softmax, else nape)"
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
    training.add_argument("--weight-decay", type=float, default=0.1, help="of matrices, not of length scalings")
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    training.add_argument("--gradient-checkpointing", action="store_true")
    training.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="a state to resume from")
    training.add_argument("--stop-after", type=int, metavar="STEPS", help="save a state there and end")
    training.add_argument("--resume", action="store_true", help="continue from the last state in --out")
    training.add_argument("--out", type=Path, help="default: runs/pretrain/ATTENTION")
    training.add_argument("--eval-tokens", type=int, default=32768, help="of the held-out text (default 32768)")
    parsed = parser.parse_args(arguments)
    if (parsed.text is None) == (parsed.dataset is None):
        parser.error("expected one source of text: either --text FILE ... or --dataset NAME")
    usual = "model" if parsed.attention == "softmax" else "nape"
    parsed.positions = parsed.positions or usual
    name = parsed.attention if parsed.positions == usual else f"{parsed.attention}-{parsed.positions}"
    parsed.out = parsed.out or common.REPOSITORY / "runs" / "pretrain" / name
    return parsed


def method_name(attention: str, positions: str) -> str:
    """The model's name in tables and figures."""
    return f"{ATTENTIONS[attention]} + {POSITIONS[positions]}"


def build_model(arguments: argparse.Namespace, vocab_size: int, end_of_text: int) -> PreTrainedModel:
    """An untrained Llama with the attention that the arguments name. Softmax with RoPE is stock transformers."""
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
    """The tokenizer, the blocks to train on, and the held-out texts.

    The tokenizer is trained on the training text. A resumed run uses the saved one.
    """
    saved = arguments.resume and (arguments.out / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(arguments.out) if saved else None
    longest = arguments.length * TIMES[-1]
    if arguments.text:
        parts = [data.split_file(path, arguments.held_out) for path in arguments.text]
        training, held_out = [part[0] for part in parts], [part[1] for part in parts]
        tokenizer = tokenizer or data.train_tokenizer(training, arguments.vocab_size, longest)
        return tokenizer, data.text_blocks(data.tokenize(training, tokenizer), arguments.length), held_out
    texts = data.stream_hub(arguments.dataset, arguments.dataset_config, arguments.dataset_column)
    skip = arguments.held_out_texts
    held_out = list(islice(texts(), skip))
    if tokenizer is None:
        sample = islice(texts(), skip, skip + TOKENIZER_TEXTS)
        tokenizer = data.train_tokenizer(sample, arguments.vocab_size, longest)
    return tokenizer, data.StreamedBlocks(texts, tokenizer, arguments.length, skip), held_out


def training_record(arguments: argparse.Namespace, name: str, parameters: int, processes: int) -> dict[str, Any]:
    """What training.json says of the run, apart from its header and its outcome."""
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "resume", "text")}
    batch_tokens = arguments.batch_size * arguments.length * arguments.gradient_accumulation * processes
    return {
        "method": name,
        "parameters": parameters,
        "text": [path.name for path in arguments.text or []],
        "settings": settings,
        "tokens_seen": arguments.steps * batch_tokens,
    }


def print_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: list[str], name: str, settings: Any
) -> None:
    """Prints the perplexity on the held-out text at each length."""
    tokens = data.tokenize(held_out, tokenizer)[: settings.eval_tokens]
    lengths = [settings.length * times for times in TIMES]
    if len(tokens) < lengths[-1]:
        print(f"No perplexity: the held-out text has {len(tokens)} tokens, and the longest window {lengths[-1]}")
        return
    results = perplexity_by_length(model, tokens, lengths, last=settings.length // 2)
    print("\n" + report({name: results}, settings.length))


def main(command: list[str] | None = None) -> list[float]:
    """Runs the recipe; see the module's description. Returns the loss of each step."""
    arguments = parse_arguments(command)
    accelerator = Accelerator(
        mixed_precision="bf16" if arguments.bf16 else "no",
        cpu=arguments.cpu,
        # the order of an epoch depends on the seed and the epoch alone, so that a resumed run sees the same
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
    model, losses = train(accelerator, model, blocks, arguments, name)
    seconds = time.perf_counter() - started
    if not accelerator.is_main_process or (arguments.stop_after or arguments.steps) < arguments.steps:
        return losses
    model.save_pretrained(arguments.out)
    record = training_record(arguments, name, model.num_parameters(), accelerator.num_processes)
    outcome = {"seconds": round(seconds, 1), "train_loss": sum(losses[-50:]) / max(1, len(losses[-50:]))}
    common.write_json(arguments.out / "training.json", {**header, **record, **outcome})
    print_perplexity(model, tokenizer, held_out, name, arguments)
    print(f"\nSaved the model, its tokenizer and training.json in {arguments.out}")
    print("Compare checkpoints with python -m recipes.pretrain.perplexity CHECKPOINT ...")
    return losses


if __name__ == "__main__":
    main()
