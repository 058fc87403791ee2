"""How Sphinx builds the site.

MyST reads the Markdown pages, autodoc the docstrings, and furo is the theme.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hf_asentmax

project = "hf_asentmax"
author = "The hf_asentmax authors"
project_copyright = author
version = release = hf_asentmax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Markdown
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Docstrings: Google style. `name` in single backticks is code, and a name of another
# package is no broken link.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Attributes", "params_style")
]  # of a configuration, its arguments
napoleon_use_rtype = (
    False  # the text before a colon under "Returns:" is a shape, not a type
)
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [(r"py:.*", r"(nn|torch|transformers)\..*")]

# Pages
html_theme = "furo"
html_title = f"hf_asentmax {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False


def _link_to_files(app: Any, page: str, source: list[str]) -> None:
    """Turn links to Markdown files outside of the site into downloads.

    MyST takes every other link to a Markdown file for one to a page.
    """
    source[0] = re.sub(
        r"\]\((\.\./(?:recipes|model_cards)/[^)#]+\.md)(?:#[^)]*)?\)",
        r"](path:\1)",
        source[0],
    )


def setup(app: Any) -> None:
    """Sphinx calls this once."""
    app.connect("source-read", _link_to_files)
