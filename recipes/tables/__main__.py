"""Writes every generated section of README.md and docs/ from the results files of the recipes.

    python -m recipes.tables             after a results file has changed
    python -m recipes.tables --check     writes nothing; exits with 1 and says what to do if a page is out of date

A section stands between two marks, <!-- NAME:begin --> and <!-- NAME:end -->. pages.py says which page has which.
"""

from __future__ import annotations

import argparse
import sys

from recipes.common import REPOSITORY
from recipes.tables.pages import PAGES, MarkError, render


def main(command: list[str] | None = None) -> None:
    """The command line; see the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether all pages are up to date")
    check = parser.parse_args(command).check
    problems = []
    for page in PAGES:
        path = REPOSITORY / page
        if not path.exists():
            continue
        before = path.read_text(encoding="utf-8")
        try:
            after = render(page, before)
        except MarkError as error:
            problems.append(str(error))
            continue
        if after == before:
            print(f"{page} is up to date")
        elif check:
            problems.append(f"{page} is out of date: run python -m recipes.tables")
        else:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {page}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
