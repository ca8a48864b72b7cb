"""One HTML file that opens from disk without a network connection.

Plotly's script is embedded once. A content security policy allows only this module's scripts, by their
hashes, and forbids loading anything, so that even text that was not escaped could neither run nor send data.
All text goes through jinja2 with autoescape. Figures are JSON in which `<`, `>` and `&` are escaped, so that
`</script>` in a token cannot end the element that contains it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from memlens.figures.theme import title_room
from memlens.files import json_text, write_atomically
from memlens.report.bibliography import Reference
from memlens.report.model import ExplorerBlock, FigureBlock, Finding, Section
from memlens.report.summary import Summary
from memlens.report.tables import shown_table


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return one row per parameter, with nested settings under dotted names.

    Lists become text, and lists of dictionaries are numbered, so that no value is shown as Python code.

    >>> flatten({"seed": 0, "ablation": {"mode": "zero", "layers": (2, 3)}, "models": [{"name": "a"}]})
    {'seed': '0', 'ablation.mode': 'zero', 'ablation.layers': '2, 3', 'models.1.name': 'a'}
    """
    rows: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        inner = _inner(value)
        if inner:
            rows |= flatten(inner, f"{name}.")
        elif isinstance(value, (Mapping, list, tuple, set)):
            rows[name] = ", ".join(map(str, value)) or "none"
        else:
            rows[name] = str(value)
    return rows


def _inner(value: Any) -> Mapping[str, Any] | None:
    """Return what is flattened further: a dictionary, or the entries of a list with dictionaries or lists."""
    nested = (Mapping, list, tuple)
    if isinstance(value, (list, tuple)) and any(isinstance(entry, nested) for entry in value):
        return {str(place): entry for place, entry in enumerate(value, 1)}
    return value if isinstance(value, Mapping) else None


def methods_text(settings: Mapping[str, Any]) -> str:
    """Return paragraphs that say how a run was made, from the settings alone.

    Args:
        settings: Facts of the model (`model`, `revision`, `backend`, `transformer_lens`, `dtype`, `device`,
            `processed_weights`), here or as a dictionary under `model`; of the sequences (`sequences`,
            `n_sequences`, `prefix_len`); `seed`; and one dictionary for each analysis.

    Example:
        >>> print(methods_text({"model": "zoo/pythia-s", "dtype": "float32", "ablation": {"mode": "zero"}}))
        The model is zoo/pythia-s, run in float32.
        <BLANKLINE>
        Ablation: mode = zero.
        <BLANKLINE>
        Means and intervals are over sequences: each sequence's values are averaged first.
    """
    model, sequences = settings.get("model"), settings.get("sequences")
    known = flatten({"": model}) if isinstance(model, Mapping) else {}
    analyses = {
        str(key).replace("_", " "): {
            name: text
            for name, text in flatten({"": value}).items()
            if known.get(name) != text and text not in ("", "None")
        }
        for key, value in settings.items()
        if key != "model" and _inner(value)
    }
    text = _environment(prose=True).get_template("methods.txt.j2").render(
        model={**settings, **model} if isinstance(model, Mapping) else settings,
        settings=settings,
        source="" if sequences is None or _inner(sequences) else flatten({"": sequences})[""],
        analyses=_shared(analyses),
    )  # fmt: skip
    return "\n\n".join(_paragraphs(text))


def _shared(analyses: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Say once what several analyses share if that is most of each, such as groups of sequences."""
    alike: list[tuple[list[str], dict[str, str]]] = []
    for name, options in analyses.items():
        for names, common in alike:
            both = {key: value for key, value in common.items() if options.get(key) == value}
            if 2 * len(both) > max(len(options), len(common)):
                names.append(name)
                common.clear()
                common |= both
                break
        else:
            alike.append(([name], dict(options)))
    said: dict[str, dict[str, str]] = {}
    for names, common in alike:
        said[" and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])] = common
        if len(names) > 1:
            for name in names:
                said[name] = {key: value for key, value in analyses[name].items() if common.get(key) != value}
    return {name: options for name, options in said.items() if options}


_PACKAGES = ("memlens", "transformer-lens", "torch", "transformers", "numpy", "xarray", "plotly")


def write_report(
    path: str | Path,
    *,
    title: str,
    findings: Sequence[Finding],
    sections: Sequence[Section],
    settings: Mapping[str, Any],
    lead: str = "",
    summary: Summary | None = None,
    command: str | None = None,
    versions: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    created: str | None = None,
    references: Sequence[tuple[Reference, str]] = (),
) -> Path:
    """Write a self-contained report and return its path.

    Args:
        path: The `.html` file; an older one is replaced atomically.
        title: The heading.
        findings: Shown first, each with its interval, n and control.
        sections: Figures and tables.
        summary: The five sentences below the heading; made from the findings by default.
        settings: Every parameter; nested dictionaries become dotted names in the table. The paragraphs on
            methods come from them (see `methods_text`).
        lead: One paragraph below the heading.
        command: The command line (or code) that repeats the run.
        versions: Package versions of the run; those installed here by default.
        warnings: What went wrong or is missing, shown above the findings.
        created: Time, as text; now by default.
        references: What is cited and what for, as returned by `bibliography`.

    Raises:
        WriteError: The file cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> found = Finding("Recall", "Half of the sequences are recalled.", 0.5, 0.3, 0.7, "share", 20)
        >>> path = write_report(
        ...     folder / "report.html", title="A report", findings=[found], sections=[], settings={"seed": 0}
        ... )
        >>> "Half of the sequences" in path.read_text(encoding="utf-8")
        True
    """
    explores = any(section.explorers for section in sections)
    plotly_js = _plotly_js() if explores or any(section.figures for section in sections) else ""
    start_js, explorer_js = _asset("report.js"), _asset("explorer.js") if explores else ""
    numbers = iter(range(1, 10**6))
    text = _environment().get_template("report.html.j2").render(
        title=title,
        lead=lead,
        summary=(summary or Summary.of({}, findings, title=title)).rows(),
        findings=findings,
        warnings=warnings,
        sections=[_section(section, place, numbers) for place, section in enumerate(sections, 1)],
        settings=flatten(settings),
        methods=_paragraphs(methods_text(settings)),
        command=command,
        seed=settings.get("seed"),
        versions=versions if versions is not None else versions_here(),
        references=references,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        policy=_policy([script for script in (plotly_js, start_js, explorer_js) if script]),
        style=Markup(_asset("report.css")),
        plotly_js=Markup(plotly_js),
        start_js=Markup(start_js),
        explorer_js=Markup(explorer_js),
    )  # fmt: skip
    return write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def versions_here() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def safe_json(text: str) -> Markup:
    r"""Return JSON that is safe inside a `<script>` element and equal to `text` when parsed.

    >>> str(safe_json('"</script><!--"'))
    '"\\u003c/script\\u003e\\u003c!--"'
    """
    marks = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    return Markup("".join(marks.get(letter, letter) for letter in text))


def _section(section: Section, place: int, numbers: Any) -> dict[str, Any]:
    return {
        "id": f"section-{place}",
        "title": section.title,
        "lead": _paragraphs(section.lead),
        "explorers": [_explorer(block, f"explorer-{place}-{i}") for i, block in enumerate(section.explorers)],
        "figures": [_figure(block, next(numbers)) for block in section.figures],
        "tables": [shown_table(block) for block in section.tables],
    }


def _explorer(block: ExplorerBlock, name: str) -> dict[str, Any]:
    data = safe_json(json_text(block.payload))
    return {"id": name, "json": data, "reading": _paragraphs(block.reading), "caption": block.caption}


def _figure(block: FigureBlock, number: int) -> dict[str, Any]:
    fig = go.Figure(block.figure)
    heading, subheading = _title_texts(fig)
    room = title_room(fig)
    top = fig.layout.margin.t  # pyright: ignore[reportAttributeAccessIssue]
    fig.update_layout(title=None, width=None, autosize=True, margin_t=max(32, (top or 100) - room))
    height = int(fig.layout.height or 450) - room  # pyright: ignore
    fig.update_layout(height=height)
    return {
        "id": f"figure-{number}",
        "number": number,
        "heading": heading or block.caption or f"Figure {number}",
        "subheading": subheading,
        "json": safe_json(fig.to_json() or "{}"),
        "height": height,
        "reading": _paragraphs(block.reading),
        "caption": block.caption,
    }


def _title_texts(fig: go.Figure) -> tuple[str, str]:
    """Return title and subtitle as plain text: HTML headings wrap, plotly's titles do not."""
    title: Any = fig.layout["title"]
    texts = (title.text or "", title.subtitle.text or "")
    shown = [html.unescape(re.sub(r"<br\s*/?>", " ", text)) for text in texts]
    return shown[0], shown[1]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _environment(*, prose: bool = False) -> jinja2.Environment:
    """Return the environment of the HTML page, or of a text in which facts may be missing."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("memlens.report", "assets"),
        autoescape=not prose,
        undefined=jinja2.Undefined if prose else jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return resources.files("memlens.report").joinpath("assets", name).read_text(encoding="utf-8").strip()


def _plotly_js() -> str:
    """Return plotly's script without anything that would end a `<script>` element early."""
    script = re.sub(r"<(?=/script|!--)", r"\\x3c", get_plotlyjs(), flags=re.IGNORECASE)
    return script.replace("\r\n", "\n").strip()


def _policy(scripts: Sequence[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    rules = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    return rules + "; font-src data:; base-uri 'none'; form-action 'none'"
