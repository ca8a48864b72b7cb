"""The audit on the smallest model of the zoo: what leaks, what is hidden, and a step that fails."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.errors import ColumnError, EmptySetError, FileFormatError, OptionError, SequenceError
from memlens.organisms.training.architectures import untrained_like
from memlens.studies import running
from memlens.studies.auditing import leaks, remedies, study
from memlens.studies.auditing.command import AuditInputs
from memlens.studies.auditing.findings import MEMORY, REFERENCE, helped
from memlens.studies.auditing.leaks import made_like
from memlens.studies.auditing.redaction import hiding, masked, quiet_reading, without_quotes
from memlens.studies.running import StudyRun
from tests.cli.test_commands import call
from tests.report.pages import sentences

MODEL = "zoo/pythia-xs"
ADDRESSES = ("qzxvk77@wyjqfomb.org", "hrwdu41@zpkqxvul.net")
QUICK = ml.studies.AuditOptions(
    steps=("leak", "little", "memory"),
    max_leaking=6,
    max_canaries=2,
    most_nodes=50,
    deletion_budget=12,
    draws=1,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return ml.load_model(MODEL)


@pytest.fixture(scope="module")
def table(model: Any) -> pd.DataFrame:
    """Idioms and identifiers of the zoo, half of them learned, and addresses that nothing was trained on."""
    idioms = ml.load_sequences("zoo:expressions", model).table.query("copies in (0, 256)")
    numbers = ml.load_sequences("zoo:identifiers", model).table.query("copies in (0, 256)")
    rows = [
        *(
            {"text": t, "secret": " ".join(t.split()[-2:]), "copies": n}
            for t, n in zip(idioms["text"], idioms["copies"], strict=True)
        ),
        *(
            {"text": t, "secret": s, "copies": n}
            for t, s, n in zip(numbers["text"], numbers["target"], numbers["copies"], strict=True)
        ),
        *(
            {"text": f"The mail of Brannoc is {secret} today", "secret": secret, "copies": 0}
            for secret in ADDRESSES
        ),
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def strings(model: Any, table: pd.DataFrame) -> ml.SequenceSet:
    return ml.sequences.secret_sequences(table, model)


@pytest.fixture(scope="module")
def run(model: Any, strings: ml.SequenceSet, tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    folder = tmp_path_factory.mktemp("audit")
    return ml.studies.audit(
        model, strings, folder, reference=untrained_like(model), options=QUICK, progress=False
    )


def test_those_leak_that_were_planted(run: StudyRun, strings: ml.SequenceSet, model: Any) -> None:
    assert run.failures == {}
    found = pd.read_csv(run.report.parent / "leaks.csv", dtype={"secret": str})
    assert found["leaks"].tolist() == sorted(
        found["leaks"], key=("whole", "by sampling", "nearly", "no").index
    )
    by_place = found.assign(place=found["string"].str.removeprefix("string ").astype(int) - 1).set_index(
        "place"
    )
    by_place = by_place.sort_index()
    assert by_place["secret"].tolist() == strings.table["secret"].tolist()
    copies = strings.table["copies"].to_numpy()
    leaks = by_place["leaks"].isin(["whole", "by sampling"]).to_numpy()
    assert leaks[copies == 256].mean() > 0.9
    assert not leaks[copies == 0].any()
    exact = ml.score_recall(model, strings, generate=False, metrics=(), progress=False).table["exact_match"]
    assert by_place["exact_match"].tolist() == exact.tolist()
    assert run.findings[0].estimate == pytest.approx(leaks.mean())
    assert run.findings[0].n == len(strings)
    # The secrets that come out stand out from others of their form, the others do not.
    known = by_place[by_place["exposure"].notna()]
    assert known["exposure_among"].value_counts().to_dict() == {"digits": 2, "characters": 2}
    assert known.query("exposure_among == 'digits'")["secret"].str.isdigit().all()
    assert not known.query("exposure_among == 'characters'")["secret"].str.isdigit().any()
    assert np.all(known["exposure"] <= known["exposure_most"] + 1e-9)


def test_from_how_little_is_what_the_instruments_say(
    run: StudyRun, strings: ml.SequenceSet, model: Any
) -> None:
    found = pd.read_csv(run.report.parent / "leaks.csv")
    some = found[found["shortest_prefix"].notna()]
    assert len(some) == QUICK.max_leaking
    rows = [int(str(name).removeprefix("string ")) - 1 for name in some["string"]]
    again = ml.recall.prompt_compression(model, strings[rows], progress=False)
    assert some["shortest_prefix"].tolist() == again["fewest_tokens"].values.tolist()
    assert np.all(some["deleted_to"] <= some["prefix_tokens"])
    assert set(some["with_1_replaced"]) <= {0.0, 1.0}
    little = next(f for f in run.findings if f.title == "From how little?")
    given = ml.load_result(run.report.parent / "extraction_curve.nc")["exact_match"]
    last = given.isel(prefix_len=-1).dropna("sequence")
    assert str(little.control).endswith(f": {int(last.sum())} of {last.size}")
    assert {"recall", "extraction_curve", "deletion"} == {p.stem for p in run.report.parent.glob("*.nc")}


def test_a_note_explains_the_columns_that_are_there(run: StudyRun, model: Any, tmp_path: Path) -> None:
    def notes(folder: Path) -> dict[str, str]:
        return {t["name"]: t["note"] for t in json.loads((folder / "run.json").read_text())["tables"]}

    assert "exposure (bits): by how much" in notes(run.report.parent)["leaks"]
    some = ml.load_sequences("zoo", model)[::40]
    options = replace(QUICK, steps=("leak",))
    ml.studies.audit(model, some, tmp_path, options=options, progress=False)
    note = notes(tmp_path)["leaks"]
    assert "alike to others: how like" in note
    assert "exposure" not in note


def test_a_reference_that_says_the_same_is_no_memory(
    model: Any, strings: ml.SequenceSet, run: StudyRun, tmp_path: Path
) -> None:
    leaking = pd.read_csv(run.report.parent / "leaks.csv").query("leaks == 'whole'")
    assert not leaking["reference_exact"].to_numpy().any()
    assert MEMORY in set(leaking["verdict"])
    same = ml.load_model(MODEL)
    options = replace(QUICK, steps=("leak", "memory"), max_canaries=0)
    again = ml.studies.audit(model, strings, tmp_path, reference=same, options=options, progress=False)
    found = pd.read_csv(tmp_path / "leaks.csv").query("leaks == 'whole'")
    assert MEMORY not in set(found["verdict"])
    assert REFERENCE in set(found["verdict"])
    asked = {f.title: f for f in again.findings}
    assert "of the reference: 0 [0, 0] nats per token" in str(asked["Is it memory?"].control)
    # After another string's text a recalled secret is far less likely, whatever the reference says.
    leaks, after = found["target_logprob"], found["logprob_after_other_text"]
    assert np.mean(leaks - after) > 1
    skipped = {f.title: f.statement for f in again.findings if f.estimate is None}
    assert skipped["From how little?"] == "Not asked: it is not among the chosen steps."


def pieces(table: pd.DataFrame) -> list[re.Pattern[str]]:
    """What must not be found: every secret, its words and its runs of five signs, where they are telling."""
    found = [re.escape(secret) for secret in table["secret"] if not secret.isdigit()]
    found += [rf"(?<![\d.]){secret}(?!\d)" for secret in table["secret"] if secret.isdigit()]
    for secret in ADDRESSES:
        bare = secret.rpartition(".")[0]
        found += [re.escape(bare[i : i + 5]) for i in range(len(bare) - 4)]
    return [re.compile(piece) for piece in found]


def test_nothing_but_the_csv_holds_a_secret(
    table: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """All five questions from the shell: files and their names, standard output and error, logs, warnings."""
    source, text, out = tmp_path / "in.csv", tmp_path / "text.txt", tmp_path / "out"
    table.assign(id=table["secret"]).to_csv(source, index=False)
    text.write_text("Anselm sold the old boat and the farmer walked home. " * 40)
    code, shown, error = call(
        "audit", MODEL, str(source), "--text", str(text), "--out", str(out), "--max-leaking", "8",
        "--max-canaries", "1", "--most-nodes", "20", "--deletion-budget", "4", "--ranked-sequences", "1",
        "--max-others", "4", "--n-random", "0", "--edited-neurons", "4", "--most-forwards", "5",
        "--fail-above", "50%",
    )  # fmt: skip
    assert code == 0, error
    csv, kept = out / "leaks.csv", out / "leaks.csv.steps"
    assert stat.S_IMODE(csv.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    written = {p for p in out.rglob("*") if p.is_file() and kept not in p.parents}
    names = [str(p) for p in kept.rglob("*")]
    assert names
    said = [shown, error, caplog.text, *(str(w.message) for w in recwarn.list), *map(str, written), *names]
    said += [p.read_bytes().decode("utf-8", "replace") for p in written - {csv}]
    for piece in pieces(table):
        assert not [words for words in said if piece.search(words)], piece.pattern
        assert piece.search(csv.read_text())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert masked(ADDRESSES[0]) == "q[18 hidden]g"
    for secret in ADDRESSES:
        assert masked(secret) in page
        assert masked(secret) in json.dumps(pd.read_parquet(out / "leaks.parquet").to_dict("records"))
    assert page.count('class="chart"') <= 6
    known = json.loads((out / "run.json").read_text())
    assert len(known["figures"]) == 2
    titles = [finding["title"] for finding in known["findings"]]
    for question in ("leak?", "little?", "memory?", "model?", "help? (bypass)", "help? (neurons rewritten)"):
        assert [title for title in titles if title.endswith(question)]
    helped = next(f for f in known["findings"] if f["title"].endswith("(bypass)"))
    assert "The perplexity of the text goes from" in helped["statement"]


def test_a_step_that_fails_keeps_the_others_and_hides_secrets_in_its_message(
    model: Any, strings: ml.SequenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError(f"no place for {ADDRESSES[0]} nor for {ADDRESSES[1][3:]}")

    monkeypatch.setattr(study, "rank", fail)
    options = replace(QUICK, steps=("leak", "memory", "where"), max_canaries=0)
    run = ml.studies.audit(model, strings, tmp_path, options=options, progress=False)
    assert list(run.failures) == ["where"]
    assert "no place for [hidden] nor for [hidden]" in run.failures["where"]
    assert "Is it memory?" in [finding.title for finding in run.findings]
    assert "where failed" in caplog.text
    assert not pieces(pd.DataFrame({"secret": ADDRESSES}))[0].search(caplog.text)
    asked = next(finding for finding in run.findings if finding.title == "Is it memory?")
    assert "no reference model" in asked.statement


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ("0", 0),
        ("5", 5),
        ("2%", 1),
        ("0%", 0),
        ("100%", 50),
        ("0.02", 1),
        (".5", 25),
        ("0.0", 0),
        (None, None),
    ],
)
def test_a_limit_is_a_count_or_with_a_percent_sign_or_a_point_a_share(
    given: str | None, limit: float | None
) -> None:
    assert ml.studies.AuditOptions(fail_above=given).limit(50) == limit


@pytest.mark.parametrize("given", ["1.0", "1.5", "-1", "101%", "many", "", "%"])
def test_other_limits_are_refused(given: str) -> None:
    with pytest.raises(OptionError, match="neither a number of strings nor a share"):
        ml.studies.AuditOptions(fail_above=given)


def test_the_exit_code_says_whether_too_many_leak(table: pd.DataFrame, tmp_path: Path) -> None:
    source, text = tmp_path / "in.jsonl", table["text"].tolist()
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    base = (
        "audit",
        MODEL,
        "--scan",
        str(source),
        "--pattern",
        r"is (\d{6})",
        "--steps",
        "leak",
        "--max-canaries",
        "0",
    )
    base = (*base, "-q", "--csv", str(tmp_path / "full.csv"), "--out", str(tmp_path / "out"))
    code, shown, error = call(*base, "--fail-above", "0", "--json")
    assert code == 3, error
    found = json.loads(shown)
    assert "more than --fail-above 0 allows" in found["exceeded"]
    assert found["csv"] == str(tmp_path / "full.csv")
    assert {row["kind"] for row in found["strings"]} == {"pattern"}
    assert not {"id", "prefix", "target", "generated"} & set(found["strings"][0])
    assert len(found["strings"]) == table["secret"].str.isdigit().sum()
    assert call(*base, "--fail-above", "100%")[0] == 0
    assert call(*base)[0] == 0
    open_code, open_shown, _ = call(*base, "--no-redact", "--json")
    assert open_code == 0
    assert "generated" in json.loads(open_shown)["strings"][0]


def test_strings_that_do_not_leak_leave_the_other_questions_unasked(model: Any, tmp_path: Path) -> None:
    strings = ml.sequences.secret_sequences(
        [f"Write to {a} soon" for a in ADDRESSES], model, patterns=["email"]
    )
    run = ml.studies.audit(model, strings, tmp_path, progress=False)
    assert run.failures == {}
    assert run.exceeded == ""
    assert run.findings[1].statement == "Of the secrets with few digits or none, none leaks."
    assert "bits for 2 that do not leak" in str(run.findings[1].control)
    assert [f.statement for f in run.findings[2:]] == ["Not asked: no string leaks."] * 4
    assert "too few" in run.findings[0].number  # two strings give no interval
    said = sentences(run.report)
    assert "0 of " in said["found"]
    assert "strings leak: 0 come out whole after the text before them" in said["found"]
    assert said["compared"].startswith("What comes out is ")


def test_a_large_perplexity_has_no_exponent() -> None:
    row = dict.fromkeys(("change", "change_low", "change_high"), -0.5) | {
        "strings": 4,
        "what": "x",
        "remedy": "y",
    }
    row |= {"whole_before": 1.0, "whole_after": 0.5, "others_whole_before": 0.0, "others_whole_after": 0.0}
    row |= {"another_string_instead": 0.0, "change_random": np.nan, "change_random_components": np.nan}
    ratio = {"perplexity_ratio": 1.3, "perplexity_ratio_low": 1.2, "perplexity_ratio_high": 1.4}
    statement = helped({**row, **ratio, "perplexity_before": 1890.0, "perplexity_after": 2520.0}).statement
    assert "from 1,890 to 2,520 (1.3 [1.2, 1.4] times)" in statement


def test_whole_strings_are_audited_from_their_first_half(model: Any, tmp_path: Path) -> None:
    source = tmp_path / "lines.txt"
    source.write_text("the old farmer sold the copper\nThe number is 4\n")
    seqs = AuditInputs(sequences=str(source)).load(model)
    assert seqs.prefix_len.tolist() == [max(1, int(n) // 2) for n in seqs.lengths]
    assert AuditInputs(sequences=str(source), prefix_len=2).load(model).prefix_len.tolist() == [2, 2]


def test_columns_with_other_names_are_read_and_empty_files_are_called_so(model: Any, tmp_path: Path) -> None:
    source, secret = tmp_path / "s.csv", ADDRESSES[0]
    source.write_text(f"satz,geheim\nThe mail of Brannoc is {secret} today,{secret}\n")
    found = AuditInputs(sequences=str(source), text_column="satz", secret="geheim").load(model)
    assert found.table["secret"].tolist() == [secret]
    assert len(AuditInputs(sequences=str(source), text_column="satz").load(model)) == 1
    for text, said in (("", "no columns, so it may be empty"), ("text,secret\n", "has no rows")):
        source.write_text(text)
        with pytest.raises((ColumnError, EmptySetError), match=said):
            AuditInputs(sequences=str(source)).load(model)


def test_bad_inputs_are_refused_before_any_work(model: Any, strings: ml.SequenceSet, tmp_path: Path) -> None:
    for given in ({}, {"sequences": "a.txt", "scan": "b.txt"}):
        with pytest.raises(OptionError, match="give one of them"):
            AuditInputs(**given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="--scan finds secrets by their form"):
        AuditInputs(scan="b.txt")
    with pytest.raises(OptionError, match="both say what is secret"):
        AuditInputs(sequences="b.txt", secret="a", pattern="b")
    with pytest.raises(OptionError, match="need the answer to leak"):
        ml.studies.AuditOptions(steps=("where",))
    with pytest.raises(OptionError, match="name ends in"):
        ml.studies.AuditOptions(csv=tmp_path / "a.parquet")
    with pytest.raises(OptionError, match="the model itself"):
        ml.studies.audit(model, strings, tmp_path, reference=model)
    with pytest.raises(FileNotFoundError):
        ml.studies.audit(model, strings, tmp_path, text=tmp_path / "none.txt")
    with pytest.raises(EmptySetError):
        ml.studies.audit(model, strings[:0], tmp_path)


def test_a_folder_with_tables_of_its_own_is_refused(
    model: Any, strings: ml.SequenceSet, table: pd.DataFrame, tmp_path: Path
) -> None:
    """A report shows every table of its folder, so it would show the strings."""
    table.to_parquet(tmp_path / "strings.parquet")
    with pytest.raises(OptionError, match="holds 1 tables of something else"):
        ml.studies.audit(model, strings, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["strings.parquet"]


def test_when_every_string_leaks_remedies_are_judged_against_made_ones(
    model: Any, strings: ml.SequenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(
        QUICK, steps=("leak", "help"), max_canaries=0, n_samples=4, n_random=0, edited_neurons=(2,),
        most_forwards=5, ranked_sequences=1, max_others=3,
    )  # fmt: skip
    some = strings[strings.table["copies"].to_numpy() == 256][:4]
    (tmp_path / "leaks.csv").write_text("of an earlier audit")
    run = ml.studies.audit(model, some, tmp_path, options=options, progress=False)
    assert run.failures == {}
    assert run.findings[0].estimate == 1
    assert "Of 3 made strings, since every given one leaks, " in run.findings[-1].statement
    made = made_like(model, some, 3, 0)
    for row, n in zip(made.rows(), made.prefix_len.tolist(), strict=True):
        text = re.sub("[a-z]", "a", re.sub("[0-9]", "0", model.tokenizer.decode(row)))
        forms = [re.sub("[a-z]", "a", re.sub("[0-9]", "0", model.tokenizer.decode(r))) for r in some.rows()]
        assert text in forms
        assert n in some.prefix_len.tolist()
    # And what an earlier audit found is gone, if this one finds nothing.
    monkeypatch.setattr(running, "score_recall", lambda *_, **__: 1 / 0)
    failed = ml.studies.audit(model, some[:3], tmp_path, options=options, progress=False)
    assert list(failed.failures) == ["leak"]
    assert not (tmp_path / "leaks.csv").exists()


def test_a_second_run_does_what_is_missing(
    model: Any, strings: ml.SequenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, it goes on and ends as without a stop; a changed option costs what depends on it."""
    options = replace(
        QUICK, steps=("leak", "little", "memory", "help"), n_samples=4, n_random=0, edited_neurons=(2, 3),
        most_forwards=5, ranked_sequences=1, max_others=3, damaged=(1,),
    )  # fmt: skip
    copies = strings.table["copies"].to_numpy()
    some = strings[np.flatnonzero(copies == 256)[:5].tolist() + np.flatnonzero(copies == 0)[-4:].tolist()]
    asked: list[str] = []
    steps = {
        running: ("score_recall",),
        leaks: ("exposure",),
        study: ("extraction_curve", "prompt_compression", "rank", "counterfactual_memorization"),
        remedies: ("sweep", "evaluate_mitigation"),
    }
    stop = ["evaluate_mitigation"]

    def watched(name: str, work: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in stop:
                raise KeyboardInterrupt
            asked.append(name)
            return work(*args, **kwargs)

        return run

    for module, names in steps.items():
        for name in names:
            monkeypatch.setattr(module, name, watched(name, getattr(module, name)))

    def ask(folder: str, **changed: Any) -> pd.DataFrame:
        asked.clear()
        run = ml.studies.audit(
            model, some, tmp_path / folder, reference=untrained_like(model),
            options=replace(options, **changed), progress=False,
        )  # fmt: skip
        assert run.failures == {}
        return pd.read_csv(tmp_path / folder / "leaks.csv", dtype={"secret": str})

    with pytest.raises(KeyboardInterrupt):
        ask("stopped")
    # Killed after a file was written and before it was named:
    (tmp_path / "stopped" / "remedies.parquet").write_bytes(b"cut")
    stop.clear()
    again = ask("stopped")
    assert set(asked) <= {"sweep", "evaluate_mitigation"}  # a finished sweep is read by sweep itself
    assert asked.count("evaluate_mitigation") == 3
    whole = ask("whole")
    assert set(asked) == {name for names in steps.values() for name in names}
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    for name in ("remedies.parquet", "leaks.parquet"):
        frames = [pd.read_parquet(tmp_path / folder / name) for folder in ("stopped", "whole")]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    found = [
        [f["statement"] for f in json.loads((tmp_path / folder / "run.json").read_text())["findings"]]
        for folder in ("stopped", "whole")
    ]
    assert found[0] == found[1]

    def redone(**changed: Any) -> set[str]:
        ask("whole", **changed)
        return {name for name in asked if name != "sweep"}

    assert redone(near=0.5, fail_above="1") == {"evaluate_mitigation"}
    assert redone(deletion_budget=5) == {"prompt_compression"}
    assert redone(damaged=(1, 2)) == {"score_recall"}
    assert redone(alternatives="characters", max_canaries=9, steps=("leak",)) == {"exposure"}
    assert redone(n_samples=5, steps=("leak",)) == {"score_recall"}


def test_a_remedy_is_chosen_by_what_it_removes_and_what_it_costs(
    model: Any, strings: ml.SequenceSet, tmp_path: Path
) -> None:
    """Against the rule applied by hand to every set of layers that is tried."""
    from memlens.benchmark.ranking import rank

    copies = strings.table["copies"].to_numpy()
    text = ml.load_sequences("zoo:heldout", model, prefix_len=1, limit=6)
    sets = remedies.Sets.of(strings[copies == 256][:8], strings[copies == 0][:4], text, 0)
    assert sets.apart
    assert not {tuple(row) for row in sets.choosing.rows()} & {tuple(row) for row in sets.measuring.rows()}
    ranking = rank(model, sets.choosing, "neuron", localizer="gate gradient")
    folder = running.StudyDirectory(tmp_path)
    options = replace(QUICK, edited_neurons=(3, 2, 3))
    bypass, zero, rewritten = remedies.remedies(model, sets, ranking, options, folder)
    assert sets.text is not None

    def gain(layers: list[int]) -> float:
        edit = ml.edits.attention_bypasses(model, layers=[layers])
        hits = ml.sweep(model, sets.choosing, edit, progress=False).effect("exact_match").mean()
        loss = ml.sweep(model, sets.text[0], edit, ("target_logprob",), progress=False)  # pyright: ignore
        return float(loss.effect("target_logprob").mean() - hits)

    chosen = [int(n) for n in re.findall(r"\d", bypass.words)]
    assert gain(chosen) >= -1e-5 + max(gain([layer]) for layer in range(4))
    count = int(re.findall(r"\d+", zero.words)[0])
    assert count in (2, 3)
    assert len(zero.make().components) == len(rewritten.make().components) == count  # pyright: ignore


def test_errors_of_reading_quote_nothing_that_was_read(model: Any, tmp_path: Path) -> None:
    broken, odd = tmp_path / "broken.jsonl", tmp_path / "odd.jsonl"
    broken.write_text(f'{{"text": "{ADDRESSES[0]}"}}\n{{"{ADDRESSES[1]}: 1}}\n')
    odd.write_text(f'{{"text": "{ADDRESSES[0]}"}}\n{{"text": 5550123456}}\n')
    for path, kind in ((broken, FileFormatError), (odd, SequenceError)):
        with pytest.raises(kind) as plain:
            AuditInputs(sequences=str(path)).load(model)
        with pytest.raises(kind) as quiet, quiet_reading(True):
            AuditInputs(sequences=str(path)).load(model)
        assert path.name in str(quiet.value)
        telling = (ADDRESSES[1], "5550123456")
        assert any(secret in str(plain.value) for secret in telling)
        assert not any(secret in str(quiet.value) for secret in telling)
    with pytest.warns(UserWarning, match=r"\[hidden\]"), quiet_reading(True):
        ml.load_sequences([("the farmer sold qzx", "vk77 now")], model)


def test_pieces_of_a_secret_are_hidden_and_other_words_are_not() -> None:
    hide = hiding(
        ["ada@lovelace.org", "a long sentence that is not a secret by itself but is taken for prose, yes"]
    )
    assert hide("ada@ and love are left") == "ada@ and love are left"
    assert hide("see lovelace.org") == "see [hidden]"
    assert hide("a long list of sentences") == "a long list of sentences"
    assert "[hidden]" in hide("the sentence that is not a secret")
    assert masked("  abcde ") == "[5 hidden]"
    assert without_quotes("'utf-8' codec, 'ä'") == "'utf-8' codec, [hidden]"
    assert without_quotes("it's the model's 'a b' or \"c'd\"") == "it's the model's [hidden] or [hidden]"


def test_the_likeness_to_others_leaves_out_the_same_secret() -> None:
    from memlens.studies.auditing.leaks import likeness_to_others

    assert np.isnan(likeness_to_others(["a", "a"], ["x", "x"], 0)).all()
