"""The code blocks of a Markdown page, and how a shell command that a page shows is checked without running it."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line of the page on which the text begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page; MyST's directives, ```{name}, are none."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    fences = [token for token in tokens if token.type == "fence" and not token.info.startswith("{")]
    return [Block(token.info.strip(), token.content, token.map[0] + 2) for token in fences if token.map]


def check_shell(block: Block) -> None:
    """Every command of a block exists and takes the options that are shown.

    Raises:
        AssertionError: a syntax error, or a command, target, extra, module, option or marker that does not exist.
    """
    parsed = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            _check_command(words)


def _check_command(words: list[str]) -> None:
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert set(targets) <= set(known), f"make {targets}: the targets are {known}"
        case ["pip", "install", *packages] | ["python", "-m", "pip", "install", *packages]:
            for extra in re.findall(r"\.\[([^]]+)\]", " ".join(packages)):
                assert set(extra.split(",")) <= PROJECT["project"]["optional-dependencies"].keys(), extra
        case ["python", "-m", "pytest", *options]:
            _check_pytest(options)
        case ["python", "-m", module, *options]:
            shown = [option.partition("=")[0] for option in options if option.startswith("-")]
            missing = [option for option in shown if not re.search(rf"(^|[\s,]){option}\b", help_of(module))]
            assert not missing, f"python -m {module} --help does not name {missing}"
        case ["git" | "cd" | "pre-commit" | ".venv/bin/pre-commit", *_]:
            pass
        case _:
            raise AssertionError(f"a command that no rule of tests/docs/code_blocks.py checks: {shlex.join(words)}")


def _check_pytest(options: list[str]) -> None:
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    for option, value in zip(options, [*options[1:], ""], strict=True):
        if option == "-m":
            used = set(re.findall(r"\w+", value)) - {"not", "and", "or"}
            assert used <= markers, f"pytest -m {value!r}: the markers are {markers}"
        elif not option.startswith("-") and "/" in option:
            assert (ROOT / option.partition("::")[0]).exists(), option


@cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints, run in this process: importing torch again would take seconds."""
    printed, arguments = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a module that its package has imported already
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = arguments
    return printed.getvalue()
