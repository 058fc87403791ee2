"""Ablations: MQMTAR's first run with one thing changed, compared by e of the query-error law.

    python -m recipes.synthetic.ablations --seeds 0                  # every variant that has no result yet
    python -m recipes.synthetic.ablations --only base "no jitter"
    python -m recipes.synthetic.ablations --report                   # only write the table again

Every run trains on the paper's distribution. The unchanged run, "base", has no hard samples; the first run of mqmtar.sh
has them by now, and they are a variant here. e is how often one wrong pair of n beats the right one (1 - query accuracy
= n e). It is measured at 64 times the training length, on samples that are not the tests'. It distinguishes runs long
after the accuracy at short lengths is saturated. Results go to recipes/synthetic/ablations/ as results.json and a
table. Runs are added to results only if they were made alike.
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

from recipes.common import markdown_table, write_json

__all__ = ["VARIANTS", "main", "table"]

RESULTS = Path(__file__).parent / "ablations"
SCRIPT = Path(__file__).with_name("mqmtar.sh")
_UNCHANGED = "--hard-candidates 1"  # in all runs, instead of what mqmtar.sh has
# The flags that each variant changes.
VARIANTS: dict[str, str] = {
    "base": "",
    "no corrupted answers": "--corrupt 0",
    "all answers corrupted": "--corrupt 1",
    "no jitter": "--jitter 1",
    "no key noise": "--key-noise 0",
    "corrupted answers alone": "--jitter 1 --key-noise 0",
    "jitter and noise from the start": "--ease-in 0",
    "hard samples in the second half": "--hard-candidates 4 --hard-from 0.5",
    "batch halved": "--batch 256",
    "batch doubled": "--batch 1024",
    "learning rate halved": "--lr 2.5e-4",
    "learning rate doubled": "--lr 1e-3",
    "delta 0": "--attention delta=0",
    "geometric ALiBi slopes": "--attention alibi_slopes=geometric",
    "positions alibi": "--positions alibi --jitter 1 --key-noise 0",
    "positions rope": "--positions rope",
    "positions nope": "--positions nope",
    "one query": "--min-queries 1 --max-queries 1",
    "one to eight queries": "--min-queries 1 --max-queries 8",
}
_NOTE = (
    "Each row is MQMTAR's first run (`mqmtar.sh paper`, without hard samples) with one thing changed; e is measured at "
    "64 times the training length, on {samples} samples of 4 queries, after {minutes} minutes of training. The table "
    "shows what a first run needs. It does not rank rows whose e is of a similar size: most have one seed, and the "
    "seeds of the unchanged run (base) lie up to a factor of {spread:.0f} apart. The intervals cover test samples only."
)


def train(parsed: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Makes one run, and returns what the results file says about it.

    Raises:
        RuntimeError: the run failed, with its output above; or another run of that name was there.
    """
    word = re.sub(r"\W+", "-", name).strip("-")
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "METHOD": "asentmax",
        "RUNS": str(parsed.out),
        "MINUTES": str(parsed.minutes),
        "FIRST_ONLY": "1",
        "FLAGS": f"{_UNCHANGED} {VARIANTS[name]} --name {word} --validate-samples {parsed.samples} {parsed.flags}",
        "FIRST_FLAGS": "",  # the shell's own would come after the variant's flags, and override them
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "paper", str(seed)], env=environment, cwd=SCRIPT.parents[2], check=False
    )
    if done.returncode:
        raise RuntimeError(f"the run of {name!r}, seed {seed}, ended with code {done.returncode}; see its output above")
    (file,) = parsed.out.glob(f"mqmtar-asentmax-*-{word}/seed{seed}/run.json")
    run = json.loads(file.read_text())
    minutes = run["settings"]["minutes"]
    if minutes != parsed.minutes:
        raise RuntimeError(f"{file.parent} has a run of {minutes} minutes, not {parsed.minutes}: give another --out")
    kept = ("header", "samples", "seconds", "samples_per_second", "left_plateau")
    validation = run["validations"][-1] if run["validations"] else None
    return {"flags": VARIANTS[name], "validation": validation, **{key: run[key] for key in kept}}


def _times_million(validation: dict[str, Any] | None) -> str:
    if validation is None:
        return "plateau not left"
    e, low, high = (1e6 * value for value in (validation["e"], *validation["e_interval"]))
    return f"{_number(e)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _spread(results: dict[str, Any]) -> float:
    """The largest e of the unchanged run's seeds over the smallest one."""
    found = [run["validation"]["e"] for run in results["variants"].get("base", {}).values() if run["validation"]]
    return max(found) / min(found) if found and min(found) > 0 else float("nan")


def table(results: dict[str, Any]) -> str:
    """A row for each variant, in order of seed 0's e: each seed's e, and when the plateau was left.

    A dagger marks flags that train.py no longer has, because the variant did not reliably help.
    """
    variants = results["variants"]
    seeds = sorted({int(seed) for runs in variants.values() for seed in runs})

    def of_first(name: str) -> float:
        validation = next(iter(variants[name].values()))["validation"]
        return float("inf") if validation is None else float(validation["e"])

    rows, deleted = [], False
    for name in sorted(variants, key=of_first):
        some = [variants[name][str(seed)] for seed in seeds if str(seed) in variants[name]]
        left = [run["left_plateau"] and f"{run['left_plateau']['samples'] / 1e6:.1f}" for run in some]
        cells = [
            _times_million(variants[name][str(seed)]["validation"]) if str(seed) in variants[name] else ""
            for seed in seeds
        ]
        samples = sum(run["samples"] for run in some) / len(some) / 1e6
        gone = name not in VARIANTS
        deleted |= gone
        flags = f"`{VARIANTS.get(name, some[0]['flags'])}`" if some[0]["flags"] else ""
        rows.append([name + "†" * gone, flags, *cells, ", ".join(one or "never" for one in left), f"{samples:.1f}"])
    header = ["variant", "flags", *(f"seed {seed}: e x 1e6" for seed in seeds), "plateau left at, M samples"]
    text = markdown_table([*header, "samples, M"], rows) + "\n"
    if deleted:
        text += (
            "\n† The flag was deleted, as the variant did not reliably help. Its code is at the tag `lab-notebook`.\n"
        )
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help=f"some of: {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each seed (default: 0)")
    parser.add_argument("--minutes", type=float, default=1.6, help="training time of a run (default: 1.6)")
    parser.add_argument("--samples", type=int, default=2000, help="samples for e (default: 2000)")
    parser.add_argument("--flags", default="", help="further flags of train.py, for every run")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder for the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results and the table")
    parser.add_argument("--report", action="store_true", help="only write the table again")
    parsed = parser.parse_args(arguments)
    names = parsed.only or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"--only {unknown[0]!r}: expected some of {', '.join(VARIANTS)}")

    file = parsed.results / "results.json"
    alike = {name: getattr(parsed, name) for name in ("minutes", "samples", "flags")}
    results: dict[str, Any] = {**alike, "variants": {}}
    if file.exists():
        results = json.loads(file.read_text())
        differing = [f"{name} {results[name]!r}" for name in alike if results[name] != alike[name]]
        if differing and not parsed.report:
            parser.error(f"{file} has runs with {', '.join(differing)}: give the same, or another --results and --out")
    elif parsed.report:
        parser.error(f"{file} does not exist; the same command without --report makes it")
    wanted = [] if parsed.report else [(name, seed) for seed in parsed.seeds for name in names]
    missing = [(name, seed) for name, seed in wanted if str(seed) not in results["variants"].get(name, {})]
    for name, seed in tqdm(missing, unit="run", disable=not missing):
        entry = train(parsed, name, seed)
        if file.exists():  # another process may have added to it
            results = json.loads(file.read_text())
        results["variants"].setdefault(name, {})[str(seed)] = entry
        write_json(file, results)
        tqdm.write(f"{name}, seed {seed}: e x 1e6 = {_times_million(entry['validation'])}")
    note = _NOTE.format(samples=f"{results['samples']:,}", minutes=results["minutes"], spread=_spread(results))
    file.with_suffix(".md").write_text(f"# MQMTAR: ablations of the first run\n\n{note}\n\n{table(results)}")
    print(f"wrote {file} and its table")


if __name__ == "__main__":
    main(sys.argv[1:])
