"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import memlens

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "memlens"
author = "The memlens developers"
project_copyright = "2026, The memlens developers"
version = release = memlens.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"memlens {release}"
html_static_path = ["_static"]
html_theme_options = {"sidebar_hide_name": False}

autodoc_member_order = "bysource"
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; the pages show their stored outputs
nb_merge_streams = True
suppress_warnings = ["myst.domains"]

FOLDERS = {
    "models": "how a model comes in and how its blocks are run",
    "sequences": "what may have been memorized",
    "recall": "did the model recall it",
    "sweeps": "change many things, exactly and fast",
    "attribution": "where is it stored",
    "results": "labelled arrays, statistics and files",
    "figures": "one figure for each kind of array",
    "organisms": "models made to memorize",
    "studies": "questions answered end to end",
    "report": "one file to show",
    "explorer": "one sequence at a time",
}


def public_names() -> str:
    """A table of what `import memlens` offers, each name linked to where it is described."""
    rows = ["| name | what it is |", "|---|---|"]
    for name in sorted(memlens.__all__, key=str.lower):
        value = getattr(memlens, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        rows.append(f"| {{py:obj}}`ml.{name} <{value.__module__}.{value.__qualname__}>` | {first} |")
    return "\n".join(rows)


def modules_of(package: str) -> str:
    """An automodule directive for a package's every module that has something public."""
    found = importlib.import_module(package)
    parts = []
    for info in sorted(pkgutil.iter_modules(found.__path__), key=lambda item: item.name):
        name = f"{package}.{info.name}"
        module = importlib.import_module(name)
        if getattr(module, "__all__", None):
            parts.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n```\n")
    return "\n".join(parts)


def _emptied(folder: Path) -> Path:
    """Return a folder of pages that are made here, without those that an older build left."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.md"), *folder.glob("*.ipynb")):
        old.unlink()
    return folder


def write_api_pages() -> None:
    """One page a folder of the package, made from its docstrings."""
    out = _emptied(HERE / "reference")
    for name, purpose in FOLDERS.items():
        about = inspect.getdoc(importlib.import_module(f"memlens.{name}")) or ""
        page = f"# {name}: {purpose}\n\n{about}\n\n"
        (out / f"{name}.md").write_text(page + modules_of(f"memlens.{name}"), encoding="utf-8")


def write_tutorials() -> None:
    """Copies of the notebooks with figures as HTML: the pages cannot show plotly's own output type."""
    import plotly.graph_objects as go
    from plotly.offline import get_plotlyjs

    out = _emptied(HERE / "tutorials")
    for source in sorted((ROOT / "tutorials").glob("*.ipynb")):
        notebook = json.loads(source.read_text(encoding="utf-8"))
        script = '<script src="../_static/plotly.min.js"></script>'  # before the first figure, which needs it
        for output in (o for cell in notebook["cells"] for o in cell.get("outputs", [])):
            figure = output.get("data", {}).pop("application/vnd.plotly.v1+json", None)
            if figure is not None:
                figure = go.Figure({key: figure[key] for key in ("data", "layout")})
                drawn = figure.to_html(include_plotlyjs=False, full_html=False)
                output["data"], script = {"text/html": script + drawn}, ""
        (out / source.name).write_text(json.dumps(notebook), encoding="utf-8")
    (HERE / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")


def plain_returns(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from reading the words before a colon in a `Returns:` section as a type."""
    for before, line in zip(range(len(lines)), lines[1:], strict=False):
        if lines[before].strip() in ("Returns:", "Yields:") and ":" in line:
            indent = len(line) - len(line.lstrip())
            lines[before + 1] = f"{line[:indent]}: {line[indent:]}"


def cited() -> str:
    """All references as a list."""
    from memlens.report.bibliography import REFERENCES

    def entry(key: str) -> str:
        said = REFERENCES[key]
        title = f"[{said.title}]({said.url})" if said.url else said.title
        return f"- {said.authors} ({said.year}). {title}. {said.where}. `{key}`"

    return "\n".join(entry(key) for key in sorted(REFERENCES))


def fill_in(app: Any, docname: str, source: list[str]) -> None:
    """Put what is made from the package where a page asks for it."""
    for mark, text in (("PUBLIC_NAMES", public_names), ("BIBLIOGRAPHY", cited)):
        source[0] = re.sub(rf"^@{mark}@$", lambda _, text=text: text(), source[0], flags=re.MULTILINE)


write_api_pages()
write_tutorials()


def setup(app: Any) -> None:
    """Connect the hooks above."""
    app.connect("autodoc-process-docstring", plain_returns, priority=400)  # before napoleon
    app.connect("source-read", fill_in)
