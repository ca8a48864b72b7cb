"""The five sentences with which a report opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from memlens.errors import OptionError
from memlens.report.model import Finding
from memlens.report.run_directory import RunDirectory
from memlens.report.summary import Summary
from tests.report import synthetic
from tests.report.pages import said_once, sentences

PLAIN = Finding(
    "Recall", "…", 0.5, 0.25, 0.75, "share", 9, plain="half are recalled", beside="with others: more"
)


def test_a_report_opens_with_what_a_study_gave_and_its_findings_say(tmp_path: Path) -> None:
    given = {"asked": "Which are recalled?", "hides": "Nothing else."}
    run = RunDirectory(tmp_path, title="T", summary=given)
    run.add_finding(PLAIN)
    run.add_finding(Finding("Layer", "…", 1.0, plain="layer 2 matters."))
    run.add_finding(Finding("Not for everyone", "A statement."))
    run.add_failure("the last step", "no memory")
    text = run.finish().read_text(encoding="utf-8")
    assert text.index("<dt>") < text.index('id="findings"')
    assert sentences(tmp_path / "report.html") == {
        "asked": "Which are recalled?",
        "found": "Half are recalled; layer 2 matters.",
        "sure": "The true numbers are likely to lie in these ranges (95 % intervals): 0.25 to 0.75 share "
        "(Recall, n = 9).",
        "compared": "With others: more.",
        "hides": "Nothing else. What failed is missing: the last step.",
    }


def test_where_nothing_was_found_the_report_says_so(tmp_path: Path) -> None:
    nothing = Summary.of({}, [], title="Nothing")
    assert nothing.found.startswith("Nothing was found that can be put in one sentence")
    assert nothing.sure.startswith("That cannot be said")
    assert nothing.compared.startswith("Nothing: there is no control")
    bare = RunDirectory(tmp_path, title="Saved by hand")
    bare.add_result("recall", synthetic.recall())
    found = sentences(bare.finish())
    assert "Saved by hand" in found["asked"]
    assert found["found"].startswith(
        "The exact match, mean over 48 sequences, is 0."
    )  # the reading of the result
    assert found["sure"].startswith("That cannot be said")


def test_a_finding_without_plain_words_is_told_by_its_statement() -> None:
    one = Summary.of({}, [Finding("A", "Heads matter.", 1.0, 0.5, 1.5, control="random heads: 0"), PLAIN][:1])
    assert (one.found, one.compared) == ("Heads matter.", "Random heads: 0.")


def test_a_sentence_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="found"):
        RunDirectory(tmp_path, title="T", summary={"answer": "42"})
    run = RunDirectory(tmp_path, title="T", summary={"asked": "A?"})
    with pytest.raises(OptionError, match="sentence"):
        run.add_summary({"why": "so"})
    run.add_summary({"found": "This."})
    again = RunDirectory(tmp_path)  # a continued run keeps them
    again.add_finding(PLAIN)
    assert sentences(again.finish())["found"] == "This."


def test_a_clause_that_repeats_another_is_noticed() -> None:
    said_once("the model repeats 2 of 4; the model repeats 1 of 3")
    with pytest.raises(AssertionError, match="none adds to the confounds"):
        said_once("None adds to the confounds; none adds to the confounds and copies.")
