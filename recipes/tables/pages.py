"""The pages with generated sections, and how a section gets between its marks."""

from __future__ import annotations

import re
from collections.abc import Callable

from recipes.tables import quality, speed

__all__ = ["PAGES", "SECTIONS", "MarkError", "render"]

SECTIONS: dict[str, Callable[[], str]] = {
    "results": quality.results,
    "quickstart-results": quality.quickstart_results,
    "synthetic-results": quality.synthetic_results,
    "language-results": quality.language_results,
    "speed": speed.overview,
    "speed-training": speed.training,
    "speed-decoding": speed.decoding,
    "speed-generate": speed.generation,
    "speed-training-step": speed.training_step,
}
# The sections that each page has, whatever their order. A page that does not exist is left out.
PAGES: dict[str, tuple[str, ...]] = {
    "README.md": ("results", "speed"),
    "docs/results.md": tuple(name for name in SECTIONS if name not in ("results", "speed")),
}


class MarkError(ValueError):
    """The marks of a page are not those that it should have."""


def render(page: str, text: str) -> str:
    """The text of a page with all of its sections written anew.

    Args:
        page: a key of PAGES.
        text: what the page has now.

    Raises:
        MarkError: the page lacks a section, has one twice, or has one that is unknown there.
    """
    wanted, found = PAGES[page], re.findall(r"<!-- ([^:>]+):begin -->", text)
    if sorted(found) != sorted(wanted):
        missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        raise MarkError(
            f"{page} has marks for {', '.join(found) or 'no section'}, expected each of {', '.join(wanted)} once: "
            f"add {', '.join(missing) or 'none'}, remove {', '.join(unknown) or 'none but repeated ones'}"
        )
    for name in wanted:
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        section = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not section.search(text):
            raise MarkError(f"{page} has {begin}, but no {end} after it: add it")
        new = f"{begin}\n{SECTIONS[name]()}\n{end}"
        text = section.sub(lambda _, new=new: new, text)  # type: ignore[misc]
    return text
