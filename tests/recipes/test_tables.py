"""Generated sections: every number in README.md and docs/ comes from a results file in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.common import REPOSITORY
from recipes.tables import __main__ as command
from recipes.tables import origins, pages, quality, speed

HEADER = {
    "command": "python -m recipes.benchmark.attention",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "device": {"name": "a GPU"},
    "versions": {"torch": "2", "transformers": "5"},
    "seeds": [0],
}


def tables_of(text: str) -> list[list[str]]:
    """The rows of each Markdown table below its head. All have as many cells as the head."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    for table in found:
        assert len({row.count("|") for row in table}) <= 1
    return [table[2:] for table in found if table]


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_are_what_the_results_files_say(page: str) -> None:
    path = REPOSITORY / page
    if not path.exists():
        pytest.skip(f"{page} does not exist")
    text = path.read_text(encoding="utf-8")
    assert pages.render(page, text) == text, "run python -m recipes.tables"


@pytest.mark.parametrize("name", pages.SECTIONS)
def test_tables_are_short_and_well_formed(name: str) -> None:
    text = pages.SECTIONS[name]()
    found = tables_of(text)
    assert found and all(found) and max(map(len, found)) <= (6 if name in ("results", "speed") else 20)
    assert "Measured with `python -m recipes." in text and "at commit" in text


def marked(*names: str, between: str = "old") -> str:
    return "Before.\n" + "\n".join(f"<!-- {n}:begin -->\n{between}\n<!-- {n}:end -->\nAfter {n}." for n in names)


def test_only_what_lies_between_marks_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pages.SECTIONS, "results", lambda: r"new \1 results")
    monkeypatch.setitem(pages.SECTIONS, "speed", lambda: "new speed")
    text = pages.render("README.md", marked("results", "speed"))
    assert text == (
        "Before.\n<!-- results:begin -->\nnew \\1 results\n<!-- results:end -->\nAfter results.\n"
        "<!-- speed:begin -->\nnew speed\n<!-- speed:end -->\nAfter speed."
    )
    assert pages.render("README.md", text) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (marked("results"), "README.md .* add speed"),
        (marked("results", "speed", "sped"), "README.md .* remove sped"),
        (marked("results", "speed", "results"), "README.md .* once"),
        (marked("results", "speed").replace("<!-- speed:end -->", ""), "README.md has .*speed:begin.* no .*speed:end"),
    ],
)
def test_wrong_marks_are_named(text: str, message: str) -> None:
    with pytest.raises(pages.MarkError, match=message):
        pages.render("README.md", text)


def test_check_names_what_is_out_of_date_and_skips_what_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    for name in ("results", "speed"):
        monkeypatch.setitem(pages.SECTIONS, name, lambda: "new")
    readme = tmp_path / "README.md"
    readme.write_text(marked("results", "speed"))
    with pytest.raises(SystemExit, match=r"README.md is out of date: run python -m recipes\.tables"):
        command.main(["--check"])
    assert "old" in readme.read_text()
    command.main([])
    assert "old" not in readme.read_text()
    command.main(["--check"])
    assert "README.md is up to date" in capsys.readouterr().out
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="README.md has marks for no section"):
        command.main(["--check"])


def attention_file(folder: Path, cases: tuple[tuple[str, int, int], ...], *later: dict[str, Any]) -> None:
    """A results file as attention.py writes it, with ours at 2 ms and cuDNN at 3 ms."""
    rows = []
    for kind, length, head_dim in cases:
        case = {"kind": kind, "length": length, "head_dim": head_dim, "batch": 1, "heads": 16, "support": 20.0}
        for method, time in (("ours", 2.0), ("sdpa cuDNN", 3.0)):
            rows.append({**case, "method": method, "forward_backward_ms": 2 * time, "graph_ms": time})
        rows.append({**case, "method": "flex alibi", "failed": "RuntimeError"})
    (folder / "attention.json").write_text(json.dumps({**HEADER, "results": [*rows, *later]}))


def test_ratios_are_those_of_one_run(tmp_path: Path) -> None:
    kind, length, head_dim = speed.TRAINING_CASES[0]
    case = {"kind": kind, "length": length, "head_dim": head_dim, "batch": 1, "heads": 16, "support": 20.0}
    later = [
        {**case, "commit": "fedcba9", "method": method, "forward_backward_ms": time, "graph_ms": time}
        for method, time in (("ours", 1.0), ("adasplash v2", 7.0))
    ]
    attention_file(tmp_path, speed.TRAINING_CASES, *later)
    text = speed.training(tmp_path)
    first, second = tables_of(text)[0][:2]
    assert first.endswith("| 2.00 | 1.50x | - | - | 7.00x | 1.50x |")
    assert second.endswith("| 2.00 | 1.50x | - | - | - | 1.50x |")
    assert "at commits 0123456789 and fedcba9;" in text


def test_a_missing_case_is_named(tmp_path: Path) -> None:
    attention_file(tmp_path, speed.TRAINING_CASES[1:])
    with pytest.raises(ValueError, match=r"\('nape', 131072, 64\): measure them"):
        speed.training(tmp_path)


def test_the_mean_and_the_range_of_seeds(tmp_path: Path) -> None:
    runs = [
        {"method": "m", "learning_rate": 0.1, "accuracy": {"64": a, "128": 0.5}, "keys_in_use": {"64": 1.0, "128": 2.0}}
        for a in (0.5, 0.75)
    ]
    content = {**HEADER, "seeds": [0, 1], "runs": runs, "streams_per_length": 2, "queries_per_stream": 8}
    (tmp_path / "results.json").write_text(json.dumps(content))
    text = quality.quickstart_results(tmp_path / "results.json")
    assert "| m | 62.5 (50.0 to 75.0) | 50.0 |" in text and "16 queries at each length, mean of 2 seeds" in text


def test_origins_name_modules_and_commits() -> None:
    recorded = "python recipes/a/b.py --x 1; with --y; python recipes/a/c.py"
    assert origins.as_modules(recorded) == "python -m recipes.a.b --x 1; with --y; python -m recipes.a.c"
    assert origins.commits(["f54ee38 and others", "444c7c8 (nape), f54ee38", "a" * 40]) == [
        "f54ee38",
        "444c7c8",
        "a" * 10,
    ]
    text = origins.origin_of_several([{**HEADER, "command": recorded}, HEADER], "x.json")
    assert text.startswith(
        "Measured with `python -m recipes.a.b`, `python -m recipes.a.c` and `python -m recipes.bench"
    )
    assert text.endswith("on a GPU, torch 2, transformers 5, at commit 0123456789; `x.json` has the arguments.")
