"""What made the result: MQMTAR's first run again with one thing changed, for each thing, told apart by the law's e.

    python recipes/synthetic/ablations.py paper --minutes 1.6 --seeds 0        # the paper's distribution: every variant
    python recipes/synthetic/ablations.py own --only base "near misses of keys"
    python recipes/synthetic/ablations.py paper --report                        # table and figure of what is there

The unchanged run has no hard samples, which the paper's distribution has there by now: they are a row. e is how often
one wrong pair of n beats the right one (1 - query accuracy = n e), measured at 64 times the training length on samples
apart from the test's; it tells runs apart long after accuracy at short lengths is saturated. Results go to
recipes/synthetic/ablations/ as JSON, a table and a figure; variants that are there are not run again, and others are
only added if they are run alike.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.common import OURS, markdown_table, save_figure, write_json
from recipes.synthetic.report import TRACKS

__all__ = ["VARIANTS", "main"]

RESULTS = Path(__file__).parent / "ablations"
SCRIPT = Path(__file__).with_name("mqmtar.sh")
_UNCHANGED = "--hard-candidates 1"  # in the first run of mqmtar.sh, for all
# What each changes in that.
VARIANTS: dict[str, str] = {
    "base": "",
    "no corrupted answers": "--corrupt 0",
    "all answers corrupted": "--corrupt 1",
    "all answers corrupted, from the plateau on": "--corrupt 1 --corrupt-start 0.5",
    "questions corrupted": "--corrupt-questions 0.3",
    "no jitter": "--jitter 1",
    "no key noise": "--key-noise 0",
    "corrupted answers alone": "--jitter 1 --key-noise 0",
    "jitter and noise from the start": "--ease-in 0",
    "hard samples in the second half": "--hard-candidates 4 --hard-from 0.5",
    "batch halved": "--batch 256",
    "batch doubled": "--batch 1024",
    "learning rate halved": "--lr 2.5e-4",
    "learning rate doubled": "--lr 1e-3",
    "second moment over 20 updates": "--beta2 0.95",
    "queries and keys at a quarter of the rate": "--qk-lr 0.25",
    "bf16 weights": "--bf16-weights",
    "projections drawn (0.02)": "--projection-std 0.02",
    "gamma starts above 0": "--gamma-start 0.5",
    "gamma starts below 0": "--gamma-start -0.5",
    "delta 0": "--delta 0",
    "alpha from 1.05 to 1.5": "--alpha-start 1.05",
    "geometric ALiBi slopes": "--alibi-slopes geometric",
    "positions alibi": "--positions alibi --jitter 1 --key-noise 0",
    "positions rope": "--positions rope",
    "positions nope": "--positions nope",
    "one query": "--min-queries 1 --max-queries 1",
    "one to eight queries": "--min-queries 1 --max-queries 8",
    "near misses of keys": "--near-in keys",
    "near misses of values": "--near-in values",
}
OWN_ALONE = ("near misses of keys", "near misses of values")


def variants_of(distribution: str) -> list[str]:
    """The names of those that change anything on a training distribution."""
    return [name for name in VARIANTS if distribution == "own" or name not in OWN_ALONE]


def _word(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def train(parsed: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """One run; what its run.json says that the table wants.

    Raises:
        RuntimeError: the run failed, its output stands above; or another run of that name was there.
    """
    word = f"{parsed.distribution}-{_word(name)}"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "METHOD": parsed.method,
        "RUNS": str(parsed.out),
        "MINUTES": str(parsed.minutes),
        "FIRST_ONLY": "1",
        "FLAGS": f"{_UNCHANGED} {VARIANTS[name]} --name {word} --validate-samples {parsed.samples} {parsed.flags}",
        "FIRST_FLAGS": "",  # what a shell has set for mqmtar.sh would come after a variant's flags, and win
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), parsed.distribution, str(seed)], env=environment, cwd=SCRIPT.parents[2], check=False
    )
    if done.returncode:
        raise RuntimeError(f"the run of {name!r}, seed {seed}, ended with code {done.returncode}; see its output above")
    (file,) = parsed.out.glob(f"mqmtar-{parsed.method}-*-{word}/seed{seed}/run.json")
    run = json.loads(file.read_text())
    minutes = run["settings"]["minutes"]
    if minutes != parsed.minutes:
        raise RuntimeError(f"{file.parent} holds a run of {minutes} minutes, not {parsed.minutes}: give another --out")
    kept = ("header", "samples", "seconds", "samples_per_second", "left_plateau", "settings", "task_settings")
    validation = run["validations"][-1] if run["validations"] else None
    return {"flags": VARIANTS[name], "validation": validation, **{key: run[key] for key in kept}}


def _times_million(validation: dict[str, Any] | None) -> str:
    if validation is None:
        return "plateau not left"
    low, high = validation["e_interval"]
    return f"{1e6 * validation['e']:.3g} [{1e6 * low:.2g}, {1e6 * high:.2g}]"


def table(results: dict[str, Any]) -> str:
    """A row for each variant: each seed's e with its 95% interval, and when the plateau was left."""
    seeds = sorted({int(seed) for runs in results["variants"].values() for seed in runs})
    columns = ["variant", "flags", *(f"seed {seed}: e x 1e6" for seed in seeds), "plateau left at, M samples"]
    rows = []
    for name, runs in results["variants"].items():
        some = [runs[str(seed)] for seed in seeds if str(seed) in runs]
        left = ", ".join(
            f"{run['left_plateau']['samples'] / 1e6:.1f}" if run["left_plateau"] else "never" for run in some
        )
        cells = [_times_million(runs[str(seed)]["validation"]) if str(seed) in runs else "" for seed in seeds]
        samples = sum(run["samples"] for run in some) / len(some) / 1e6
        rows.append([name, f"`{some[0]['flags']}`" if some[0]["flags"] else "", *cells, left, f"{samples:.1f}"])
    return markdown_table([*columns, "samples, M"], rows) + "\n"


def _figure(results: dict[str, Any], file: Path) -> None:
    """e of every run with its 95% interval, a line for each variant."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(results["variants"])
    drawing, axes = pyplot.subplots(figsize=(8.0, max(3.0, 2.0 + 0.28 * len(names))))
    color, marker = OURS
    for row, name in enumerate(names):
        runs = list(results["variants"][name].values())
        if never := sum(run["validation"] is None for run in runs):
            text = f"plateau not left ({never} of {len(runs)} seeds)"
            axes.text(0.99, row, text, ha="right", va="center", transform=axes.get_yaxis_transform())
        for run in runs:
            if run["validation"] is None:
                continue
            low, high = run["validation"]["e_interval"]
            smallest = 1 / (run["validation"]["pairs"] * run["validation"]["queries"])
            axes.plot([max(low, smallest), max(high, smallest)], [row, row], color=color, alpha=0.4, linewidth=2)
            axes.plot(max(run["validation"]["e"], smallest), row, marker=marker, color=color)
    axes.set(
        xscale="log", xlabel="e at 64x (smaller is better), 95% interval", yticks=range(len(names)), yticklabels=names
    )
    axes.axvline(1.5e-6, color="#777777", linestyle=":", linewidth=1)
    down = axes.get_xaxis_transform()
    axes.text(1.5e-6, 0.01, "95% at 1024x", color="#777777", fontsize=7, rotation=90, ha="right", transform=down)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(
        f"MQMTAR, first run on {TRACKS[results['distribution']]}: one thing changed", fontsize=10, loc="right"
    )
    save_figure(drawing, file)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distribution", choices=("paper", "own"), help="training distribution")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"some of: {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--minutes", type=float, default=1.6, help="training time of a run (default: 1.6)")
    parser.add_argument("--samples", type=int, default=2000, help="what e is measured on (default: 2000)")
    parser.add_argument("--method", default="asentmax", help="attention (default: asentmax)")
    parser.add_argument("--flags", default="", help="further flags of train.py, for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for results, table and figure")
    parser.add_argument("--report", action="store_true", help="only remake table and figure")
    parsed = parser.parse_args(arguments)
    names = parsed.only or variants_of(parsed.distribution)
    unknown = [name for name in names if name not in variants_of(parsed.distribution)]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: expected some of {', '.join(variants_of(parsed.distribution))}")

    file = parsed.results / f"{parsed.distribution}-{parsed.method}.json"
    alike = {name: getattr(parsed, name) for name in ("distribution", "method", "minutes", "samples", "flags")}
    results: dict[str, Any] = {**alike, "variants": {}}
    if file.exists():
        results = json.loads(file.read_text())
        differing = [f"{name} {results[name]!r}" for name in alike if results[name] != alike[name]]
        if differing and not parsed.report:
            parser.error(f"{file} has runs with {', '.join(differing)}: give the same, or another --results and --out")
    elif parsed.report:
        parser.error(f"{file} is not there yet; the same command without --report makes it")
    wanted = [] if parsed.report else [(name, seed) for seed in parsed.seeds for name in names]
    missing = [(name, seed) for name, seed in wanted if str(seed) not in results["variants"].get(name, {})]
    for name, seed in tqdm(missing, unit="run", disable=not missing):
        entry = train(parsed, name, seed)
        if file.exists():  # another process may have added to it
            results = json.loads(file.read_text())
        results["variants"].setdefault(name, {})[str(seed)] = entry
        results["variants"] = {known: results["variants"][known] for known in VARIANTS if known in results["variants"]}
        write_json(file, results)
        tqdm.write(f"{name}, seed {seed}: e x 1e6 = {_times_million(entry['validation'])}")
    if not results["variants"]:
        parser.error("nothing to report")
    text = f"# MQMTAR, trained on {TRACKS[parsed.distribution]}: what made the result\n\n{table(results)}"
    file.with_suffix(".md").write_text(text)
    _figure(results, file.with_suffix(".png"))
    print(f"wrote {file}, its table and its figure")


if __name__ == "__main__":
    main(sys.argv[1:])
