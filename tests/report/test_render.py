from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from memlens.report.model import FigureBlock, Finding, Section, TableBlock
from memlens.report.render import flatten, methods_text, safe_json, write_report

NASTY = {
    "script": "<script>window.ran = 1</script>",
    "closing": "</script><img src=x onerror='window.ran = 1'><!--",
    "quotes": "\"double\" & 'single' <b>bold</b>",
    "emoji": "🦊 and 👩‍👩‍👧",
    "right-to-left": "עברית مرحبا \u202e turned",
    "long": "x" * 10_000,
    "template": "{{ 7 * 7 }} {% raw %}",
}


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def _write(folder: Path, **changes: object) -> str:
    fig = go.Figure(go.Bar(x=list(NASTY.values()), y=[1] * len(NASTY)))
    fig.update_layout(title={"text": html.escape(NASTY["script"])})
    fields: dict[str, object] = {
        "title": NASTY["closing"],
        "findings": [
            Finding(NASTY["script"], NASTY["quotes"], 0.5, 0.25, 0.75, "nats", 12, NASTY["template"])
        ],
        "sections": [
            Section(
                NASTY["script"],
                NASTY["script"],
                [FigureBlock(fig, NASTY["closing"], NASTY["script"])],
                [TableBlock("t", pd.DataFrame({"text": list(NASTY.values()), "<i>": 1.0}))],
            )
        ],
        "settings": {"a": {"b": NASTY["script"]}, "seed": 3},
        "command": NASTY["closing"],
    }
    path = write_report(folder / "sub" / "report.html", **{**fields, **changes})  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def elements(text: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(text)
    return parser.tags


def test_only_our_elements_are_there(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    names = [tag for tag, _ in elements]
    assert names.count("script") == 3  # the figure's data, plotly, the start
    assert not {"img", "b", "i", "iframe", "object"} & set(names)


def test_nothing_is_loaded(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    links = [v for _, attrs in elements for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    assert links
    assert all(link is not None and link.startswith(("#", "data:")) for link in links)
    policy = next(attrs["content"] for tag, attrs in elements if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


@pytest.mark.parametrize("name", list(NASTY))
def test_cells_show_text(text: str, name: str) -> None:
    """All of it: what is long is folded, so that no cell scrolls."""
    start, rest = (html.escape(part).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
                   for part in (NASTY[name][:600], NASTY[name][600:]))  # fmt: skip
    folded = f"<details><summary>more</summary><bdi>{rest}</bdi></details>" if rest else ""
    cell = f'<div class="cell"><bdi>{start}</bdi>{folded}</div>'
    assert cell in text.replace("&quot;", "&#34;")


def test_plotly_is_there_once_and_the_file_is_small(text: str) -> None:
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert len(text.encode()) < 8_000_000


def test_figure_data_survives(text: str) -> None:
    found = re.search(r'<script type="application/json" id="figure-1-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert "<" not in found[1]
    assert json.loads(found[1])["data"][0]["x"] == list(NASTY.values())


def test_findings_come_first_with_their_numbers(text: str) -> None:
    assert "0.5 [0.25, 0.75] nats, n = 12" in text
    assert text.index('id="findings"') < text.index('id="section-1"') < text.index('id="methods"')


def test_every_entry_of_the_contents_leads_somewhere(
    elements: list[tuple[str, dict[str, str | None]]],
) -> None:
    ids = {attrs.get("id") for _, attrs in elements}
    targets = [a["href"] for t, a in elements if t == "a" and (a.get("href") or "").startswith("#")]
    assert len(targets) == 5
    assert all((target or "")[1:] in ids for target in targets)


def test_report_without_figures_has_no_plotly(tmp_path: Path) -> None:
    text = _write(tmp_path, sections=[])
    assert len(text) < 100_000


def test_long_tables_are_cut_and_say_so(tmp_path: Path) -> None:
    block = TableBlock("long", pd.DataFrame({"n": range(150)}), rows=40)
    text = _write(tmp_path, sections=[Section("s", tables=[block])])
    assert "110 more rows are not shown." in text
    assert text.count('<td class="numeric">') == 40


def test_columns_are_words_with_their_own_name_on_hovering(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"quantity": ["exact_match", "nll"], "p_corrected": [0.5, 0.04], "is_it": [True, False]}
    )
    text = _write(tmp_path, sections=[Section("s", tables=[TableBlock("tests", frame)])])
    assert 'title="p_corrected"><bdi>p, corrected for all tests</bdi>' in text
    assert '<td class="short" title="exact_match"><div class="cell"><bdi>exact match</bdi>' in text
    cells = re.findall(r'<div class="cell"><bdi>(.*?)</bdi>', text)
    assert cells[:6] == ["negative log-prob", "0.04", "no", "exact match", "0.5", "yes"]  # the clearest first


def test_recalled_sequences_come_first_and_so_does_their_recall(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "text": list("abc"),
            "id": list("xyz"),
            "exact_match": [0, 1, 0],
            "memorization_score": [0.2, 1.0, 0.7],
        }
    )
    text = _write(tmp_path, sections=[Section("s", tables=[TableBlock("recall", table)])])
    assert re.findall(r'title="(\w+)[":]', text)[:4] == ["id", "exact_match", "memorization_score", "text"]
    assert re.findall(r'<td class="short"><div class="cell"><bdi>(.)</bdi>', text) == list("ybzcxa")
    kept = {name: [1, 0] for name in ("layer", "p_corrected")}  # another table keeps its order
    text = _write(tmp_path, sections=[Section("s", tables=[TableBlock("heads", pd.DataFrame(kept))])])
    assert re.findall(r'<td class="numeric"><div class="cell"><bdi>(.)</bdi>', text) == list("1100")


def test_lone_surrogates_do_not_stop_the_report(tmp_path: Path) -> None:
    assert "\\ud800" in _write(tmp_path, lead="broken \ud800 text")


@pytest.mark.parametrize("raw", ["</script>", "<!--", "&lt;", "\u2028", 'a"b'])
def test_safe_json_parses_to_the_same(raw: str) -> None:
    safe = str(safe_json(json.dumps(raw, ensure_ascii=False)))
    assert json.loads(safe) == raw
    assert not set("<>&\u2028") & set(safe)


def test_methods_say_only_what_is_known() -> None:
    said = methods_text(
        {"model": "m", "backend": "TransformerBridge", "transformer_lens": "4.3", "n_sequences": 7}
    )
    assert "The model is m, a TransformerBridge of TransformerLens 4.3." in said
    assert "It was measured on 7 sequences." in said
    assert "seed" not in said
    assert flatten({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": "1", "d": "none"}


def test_methods_say_once_what_groups_share_and_what_the_model_is() -> None:
    model = {"model": "zoo/pythia-s", "dtype": "float32"}
    shared = {**model, "prefix_len": 32, "below": 0.5, "on_eos": "drop"}
    groups = {
        "memorized": {**shared, "n": 79},
        "other": {**shared, "n": 9},
        "predictable": {**shared, "n": 79},
    }
    said = methods_text({"model": model, **groups, "ablation": {"mode": "zero", "n": 79}}).split("\n\n")
    assert said[1:-1] == [
        "Memorized, other and predictable: prefix len = 32; below = 0.5; on eos = drop.",
        *(f"{name}: n = {n}." for name, n in (("Memorized", 79), ("Other", 9), ("Predictable", 79))),
        "Ablation: mode = zero; n = 79.",
    ]


SETTINGS = {
    "seed": 1,
    "layers": (1, 2),
    "model": {"model": "zoo/pythia-s", "revision": "", "backend": "HookedTransformer", "dtype": "float32"},
    "sequences": {"source": "zoo", "prefix_len": [8, 16]},
    "models": [{"name": "a"}, {"name": "b", "sizes": {"n": 2}}],
    "tasks": {"recall": {"chance": (0.5, None)}},
    "idioms": {},
}


def test_no_setting_is_written_as_code_in_prose_or_table() -> None:
    said = methods_text(SETTINGS)
    assert "The model is zoo/pythia-s, a HookedTransformer, run in float32." in said
    assert "Sequences: source = zoo; prefix len = 8, 16." in said
    assert "Models: 1.name = a; 2.name = b; 2.sizes.n = 2." in said
    assert "Tasks: recall.chance = 0.5, None." in said
    assert "The seed is 1." in said
    from_files = methods_text({"sequences": ["a.npy", "b.npy"], "prefix_len": 32})
    assert "on sequences from a.npy, b.npy; the model is given the first 32 tokens of each." in from_files
    for text in (said, from_files, *flatten(SETTINGS).values()):
        assert not set('{}[]()"') & set(text), text
