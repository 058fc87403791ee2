"""Every number in the README comes from a results file in the repository."""

from __future__ import annotations

from recipes.readme import README, render


def test_the_readme_is_what_the_results_files_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert render(text) == text, "run python recipes/readme.py"
