"""Sentences that say where the numbers of a table come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from recipes.common import short_commit

__all__ = ["as_modules", "commits", "origin", "origin_of_several"]


def as_modules(command: str) -> str:
    """A recorded command as it runs today: files of the recipes are run as modules, with the same arguments."""
    return re.sub(r"python (recipes/[\w/]+)\.py", lambda found: f"python -m {found[1].replace('/', '.')}", command)


def commits(texts: Iterable[str]) -> list[str]:
    """All commits that the texts name, shortened, in order and without repetitions."""
    found = (commit for text in texts for commit in re.findall(r"\b[0-9a-f]{7,40}\b", text))
    return list(dict.fromkeys(short_commit(commit) for commit in found))


def _listed(words: Iterable[str]) -> str:
    """a, b and c"""
    *first, last = dict.fromkeys(words)
    return f"{', '.join(first)} and {last}" if first else last


def origin_of_several(headers: list[dict[str, Any]], file: str, more_commits: Iterable[str] = ()) -> str:
    """The origin of a table from several runs: their module, devices, versions and commits.

    Args:
        headers: of the results files.
        file: where the full commands are, relative to the repository.
        more_commits: of single rows.
    """
    commands = "; ".join(as_modules(header["command"]) for header in headers)
    modules = (f"`{module}`" for module in re.findall(r"python -m [\w.]+", commands))
    run_at = commits([*(header["commit"] for header in headers), *more_commits])
    torches, libraries = (_listed(header["versions"][name] for header in headers) for name in ("torch", "transformers"))
    return (
        f"Measured with {_listed(modules)} on {_listed(header['device']['name'] for header in headers)}, torch "
        f"{torches}, transformers {libraries}, at commit{'s' if len(run_at) > 1 else ''} {_listed(run_at)}; "
        f"`{file}` has the arguments."
    )


def origin(header: dict[str, Any]) -> str:
    """The origin of a table from one run: its whole command, device, versions and commit."""
    return (
        f"Measured with `{as_modules(header['command'])}` on {header['device']['name']}, torch "
        f"{header['versions']['torch']}, transformers {header['versions']['transformers']}, at commit "
        f"{short_commit(header['commit'])}."
    )
