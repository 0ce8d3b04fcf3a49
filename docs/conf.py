"""How Sphinx builds the site of these pages (`make docs`): every warning ends the build.

The pages read well without a site too, and link to the experiments' READMEs beside them. So these
are copied into `docs/experiments/` for the build, and links between the two are turned.
"""

import re
import shutil
from importlib import metadata
from pathlib import Path

project = "dualpipe_jax"
author = "the dualpipe_jax developers"
project_copyright = author
release = metadata.version("dualpipe-jax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dualpipe_jax {release}"

# Pages are Markdown; their headings are link targets.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

# A notebook's code runs when the pages are built, and an error in it ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = _ROOT / "docs" / "experiments"
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def _copy_experiments(app):
    """Copies the experiments' READMEs, with their pictures, to pages of the site."""
    shutil.rmtree(_PAGES, ignore_errors=True)
    _PAGES.mkdir()
    for readme in sorted(_ROOT.glob("experiments/*/README.md")):
        (_PAGES / f"{readme.parent.name}.md").write_text(readme.read_text())
        for picture in readme.parent.glob("*.png"):
            shutil.copy(picture, _PAGES)


def _as_rst(app, what, name, obj, options, docstring):
    """Turns the docstrings' code, in single backticks as in Markdown, into that of Sphinx.

    Headings between arguments, which start with a capital letter, are left out.
    """
    lines = [line for line in docstring if not re.fullmatch(r"  [A-Z].*:", line)]
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``\\ ", "\n".join(lines))
    docstring[:] = text.split("\n")


def _turn_links(app, docname, source):
    """Turns links to READMEs into links to their pages; other files of the project keep a name."""
    is_experiment = docname.startswith("experiments/")

    def turned(match):
        text, path, anchor = match[1], match[2], match[3] or ""
        here = (
            _ROOT / "experiments" / docname.partition("/")[2] if is_experiment else _ROOT / "docs"
        )
        target = (here / path).resolve()
        if not path or "://" in path or not target.exists() or not target.is_relative_to(_ROOT):
            return match[0]
        if target.parent.parent == _ROOT / "experiments" and target.name == "README.md":
            page = f"{target.parent.name}.md"
            return f"[{text}]({'' if is_experiment else 'experiments/'}{page}{anchor})"
        if target.parent == _ROOT / "docs":
            return f"[{text}]({'../' if is_experiment else ''}{target.name}{anchor})"
        if target.suffix == ".png" and target.parent == here:
            return match[0]
        return f"{text} (`{target.relative_to(_ROOT)}`)"

    source[0] = _LINK.sub(turned, source[0])


def setup(app):
    """Has Sphinx call these functions."""
    app.connect("autodoc-process-docstring", _as_rst, priority=1)
    app.connect("builder-inited", _copy_experiments)
    app.connect("source-read", _turn_links)
