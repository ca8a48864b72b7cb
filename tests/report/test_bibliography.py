from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

import memlens.report.bibliography as bib
from memlens.errors import OptionError
from memlens.models.families import FAMILIES
from memlens.report.bibliography import REFERENCES, Citation, bibliography, citations_of, family_citation
from memlens.report.from_directory import report_from_directory
from memlens.report.run_directory import RunDirectory
from memlens.results.kinds import KINDS
from memlens.results.result import Result
from tests.report import synthetic

ROOT = Path(__file__).parents[2]


def _keys(result: Result) -> set[str]:
    return {citation.key for citation in citations_of(result)}


@pytest.mark.parametrize(
    ("kind", "metric", "settings", "keys"),
    [
        ("residual_decoding", "rank", {"lens": "logit lens: final norm"}, {"nostalgebraist2020"}),
        (
            "residual_decoding",
            "rank",
            {"lens": "tuned lens X: h", "other_streams": "logit lens"},
            {"belrose2023"},
        ),
        ("head_ablation", "margin", {"mode": "mean_of_other_heads"}, {"chen2026"}),
        ("head_ablation", "margin", {"mode": "zero"}, set()),
        ("attention_bypass", "margin", {}, {"menta2025"}),
        ("gradient_attribution", "margin", {"method": "attribution_patching"}, {"syed2023"}),
        (
            "gradient_attribution",
            "margin",
            {"method": "integrated_gradients", "path": "embedding"},
            {"syed2023", "sundararajan2017", "hanna2024"},
        ),
        ("recall", "min_k", {}, {"shi2024"}),
        ("sweep", "margin", {}, set()),
    ],
)
def test_a_result_cites_what_it_rests_on(
    kind: str, metric: str, settings: dict[str, str], keys: set[str]
) -> None:
    data = xr.Dataset({metric: ("sequence", np.ones(2))})
    assert _keys(Result.create(data, kind=kind, settings=settings)) == keys


def test_a_plugin_s_kind_with_an_unknown_source_costs_its_citation_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kind = replace(KINDS["attention_bypass"], cites=(("nobody1900", "a plugin"), ("menta2025", "bypass")))
    known = _keys(synthetic.attention_bypass())
    monkeypatch.setattr(bib, "KINDS", {"attention_bypass": kind})
    assert _keys(synthetic.attention_bypass()) == known >= {"menta2025"}
    assert "'nobody1900'" in caplog.text


def test_the_family_of_a_hub_model_is_cited_and_that_of_a_zoo_model_is_not() -> None:
    data = xr.Dataset({"margin": ("sequence", np.ones(2))})
    hub = Result.create(data, kind="sweep", model="allenai/OLMo-2-0425-1B", family="olmo2")
    assert _keys(hub) == {"olmo2024"}
    assert not _keys(Result.create(data, kind="sweep", model="zoo/olmo2-s", family="olmo2"))
    assert family_citation("something-else", "a/b") == []


def test_every_family_that_memlens_knows_is_cited() -> None:
    for family in FAMILIES.values():
        assert family_citation(family.name, "some/model"), family.name


def test_a_reference_stands_once_with_all_that_it_is_cited_for() -> None:
    said = bibliography([Citation("chen2026", "a"), Citation("chen2026", "b"), Citation("chen2026", "a")])
    entries = {reference.title: what for reference, what in said}
    assert entries[REFERENCES["chen2026"].title] == "a; b"
    assert REFERENCES["nanda2022"].title in entries
    names = [reference.authors.lower() for reference, _ in said]
    assert names == sorted(names)
    assert bibliography([]) == []


def test_an_unknown_key_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown reference 'chen2062'.*Did you mean 'chen2026'"):
        Citation("chen2062", "a slip")


def test_the_report_lists_what_its_results_and_its_study_cite(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_result("bypass", synthetic.attention_bypass())
    for _ in range(2):
        run.add_citations(Citation("haviv2023", "the study that this one follows"))
    page = html.unescape(run.finish().read_text(encoding="utf-8"))
    section = page[page.index('<section id="bibliography">') :]
    section = section[: section.index("</section>")]
    assert '<a href="#bibliography">Bibliography</a>' in page
    assert section.count(REFERENCES["haviv2023"].title) == 1
    assert "Cited for: <bdi>the study that this one follows</bdi>" in section
    assert 'href="https://arxiv.org/abs/2501.05078"' in section
    assert "Min-K" not in section


def test_a_citation_of_another_version_costs_itself_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_result("bypass", synthetic.attention_bypass())
    file = tmp_path / "run.json"
    file.write_text(file.read_text().replace('"citations": []', '"citations": [{"key": "x1", "what": "y"}]'))
    page = html.unescape(report_from_directory(tmp_path).read_text(encoding="utf-8"))
    assert "A citation is left out: unknown reference 'x1'" in page
    assert REFERENCES["menta2025"].title in page


def test_a_report_that_cites_nothing_has_no_bibliography(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, title="T", settings={})
    run.add_table("numbers", synthetic.recall().to_frame())
    assert "Bibliography" not in run.finish().read_text(encoding="utf-8")


def test_addresses_are_those_of_their_archive_numbers() -> None:
    for key in REFERENCES:
        reference = REFERENCES[key]
        number = re.search(r"arXiv:(\d{4}\.\d{5})", reference.where)
        assert not number or reference.url == f"https://arxiv.org/abs/{number[1]}", key
        assert re.fullmatch(rf"[a-z]+{reference.year}", key)


def test_every_key_that_is_cited_anywhere_is_a_reference_and_none_is_left_over() -> None:
    """In the package (a citation is checked when it is made, which may be late in a run) and its tests."""
    pattern = re.compile(r"""["']([a-z]{2,}(?:19|20)\d\d)["']""")
    code = sorted((ROOT / "memlens").rglob("*.py"))
    used = {key for file in code for key in pattern.findall(file.read_text(encoding="utf-8"))}
    data = [file for file in (ROOT / "memlens").rglob("*.yaml") if file.name != "references.yaml"]
    plain = re.compile(r"\bcites?: ([a-z]{2,}(?:19|20)\d\d)\b")
    used |= {key for file in data for key in plain.findall(file.read_text(encoding="utf-8"))}
    assert used <= set(REFERENCES), used - set(REFERENCES)
    assert set(REFERENCES) - used <= {"zhang2023"}, set(REFERENCES) - used


def test_the_citation_file_names_the_same_papers() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    known = {reference.url: reference for reference in REFERENCES.values()}
    for entry in cited:
        reference = known[entry["url"]]
        assert (entry["title"], entry["year"]) == (reference.title, reference.year)
        surnames = [author["family-names"] for author in entry["authors"]]
        assert re.findall(r"([A-Z][a-z]+),", reference.authors) == surnames


def test_numbers_in_the_docs_are_in_the_bibliography_or_said_in_full() -> None:
    """A paper that a page links to is one that memlens cites: no number is mistyped in one place only."""
    known = {reference.url.rpartition("/")[2] for reference in REFERENCES.values()}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if not {"reference", "_build"} & set(page.parts):
            found = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", page.read_text(encoding="utf-8")))
            assert found <= known, (page.name, found - known)
