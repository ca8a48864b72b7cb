"""Sphinx configuration: `python -m sphinx -W -b html docs docs/_build/html`. Nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import memlens

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from names import NAMESPACES, described, pages, public, shown_by, summary  # noqa: E402
from run_tutorials import repository  # noqa: E402

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
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
default_role = "code"

html_theme = "furo"
html_title = f"memlens {release}"
html_static_path = ["_static"]
html_theme_options: dict[str, Any] = {"sidebar_hide_name": False}
if ADDRESS := repository():
    branch = {"source_branch": "main", "source_directory": "docs/"}
    html_theme_options |= {"source_repository": ADDRESS, **branch}

autodoc_member_order = "bysource"
autodoc_typehints = "both"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

copybutton_prompt_text = (
    r">>> |\.\.\. "  # of the examples in docstrings: neither prompts nor output are copied
)
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; the pages show their stored outputs
nb_merge_streams = True
suppress_warnings = ["myst.domains"]

EXTENDING: dict[str, tuple[str, ...]] = {
    "memlens.registry": (),
    "memlens.figures": ("metric_text",),
    "memlens.forward.capture": ("captured_at_targets",),
    "memlens.forward.hooks": ("hook_name",),
    "memlens.forward.metrics": (),
    "memlens.models.families": (),
    "memlens.models.provenance": ("describe",),
    "memlens.options": ("options_class",),
    "memlens.report.bibliography": (),
    "memlens.report.model": ("FigureRequest", "Finding"),
    "memlens.report.run_directory": ("RunDirectory",),
    "memlens.results.kinds": (),
    "memlens.results.plots.layers": ("plot_by_dimensions",),
    "memlens.results.plots.selection": (),
    "memlens.results.readings": ("read_effects",),
    "memlens.results.statistics.estimates": ("Estimate",),
    "memlens.sequences.named": (),
    "memlens.sequences.readers.registry": (),
    "memlens.studies.registry": (),
    "memlens.studies.running": ("StudyDirectory", "StudyRun", "at_most"),
}
"""Modules with what an extension needs beyond the public names (docs/how-to/extend.md), and which of their
names; none for all."""


def public_names() -> str:
    """A table for each namespace: its names, each linked to its description, and what it is."""
    homes = pages()
    parts = []
    for space in ("", *NAMESPACES):
        module = getattr(memlens, space) if space else memlens
        title = f"`ml.{space}`" if space else "`ml`"
        about = summary(module) if space else "The names that most notebooks need."
        rows = [f"## {title}", "", about, "", "| name | what it is |", "|---|---|"]
        for name in public(module):
            value = getattr(module, name)
            if described(value):
                first, home, _ = homes[value]
                link = f"{{py:obj}}`{name} <{home}.{first}>`"
                rows.append(f"| {link} | {summary(value)} |")
            else:
                rows.append(f"| `{name}` | {type(value).__name__}: {', '.join(map(str, value))} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _emptied(folder: Path) -> Path:
    """Return a folder of generated pages, without those that an older build left."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.md"), *folder.glob("*.ipynb")):
        old.unlink()
    return folder


def _directive(value: Any, name: str) -> str:
    kind = "autoclass" if inspect.isclass(value) else "autofunction"
    members = "   :members:\n   :show-inheritance:\n" if inspect.isclass(value) else ""
    return f"```{{eval-rst}}\n.. {kind}:: {name}\n{members}```\n"


def write_api_pages() -> None:
    """A page per name, one per namespace that lists them, and one for the modules that extensions use."""
    out = _emptied(HERE / "reference")
    homes = pages()
    for space in ("", *NAMESPACES):
        module = getattr(memlens, space) if space else memlens
        folder = _emptied(out / (space or "ml"))
        rows = []
        for name in public(module):
            value = getattr(module, name)
            if described(value) and homes[value][:2] == (name, module.__name__):
                shown, *others = homes[value][2]
                also = f"Also {', '.join(f'`{other}`' for other in others)}.\n\n" if others else ""
                file = f"{name}-class" if inspect.isclass(value) else name  # Localizer and localizer
                page = f"# {shown}\n\n{also}{_directive(value, f'{module.__name__}.{name}')}"
                other = shown_by(value)
                if other is not None and other is not value:
                    first, home, _ = homes[other]
                    page += f"\nAn example is with {{py:obj}}`{first} <{home}.{first}>`, which makes one.\n"
                (folder / f"{file}.md").write_text(page, encoding="utf-8")
                rows.append(f"| [{name}]({space or 'ml'}/{file}.md) | {summary(value)} |")
        listed = "\n".join(["| name | what it is |", "|---|---|", *rows])
        tree = f"```{{toctree}}\n:hidden:\n:glob:\n\n{space or 'ml'}/*\n```"
        parts = [f"# ml.{space}" if space else "# ml", inspect.getdoc(module) or "", listed, tree]
        (out / f"{space or 'ml'}.md").write_text("\n\n".join(parts), encoding="utf-8")
    page = ["# Modules for extensions", "How they are used: [Extend memlens](../how-to/extend.md)."]
    for name, chosen in EXTENDING.items():
        module, known = importlib.import_module(name), {id(value) for value in homes}
        page.append(f"## {name}\n\n{inspect.getdoc(module) or ''}\n")
        for each in chosen or public(module):
            value = getattr(module, each)
            if described(value) and id(value) not in known:
                page.append(_directive(value, f"{name}.{each}"))
    (out / "extending.md").write_text("\n\n".join(page), encoding="utf-8")


def write_command_pages() -> None:
    """One page per command of `memlens`, made from its options."""
    from memlens.cli import app

    out = _emptied(HERE / "reference" / "commands")
    for name in sorted(app):
        if not name.startswith("-"):
            text = app[name].generate_docs(usage_name=f"memlens {name}")
            text = text.replace(f"# {name}\n", f"# memlens {name}\n", 1)
            (out / f"{name}.md").write_text(text, encoding="utf-8")


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
write_command_pages()
write_tutorials()


def setup(app: Any) -> None:
    """Connect the hooks above."""
    app.connect("autodoc-process-docstring", plain_returns, priority=400)  # before napoleon
    app.connect("source-read", fill_in)
