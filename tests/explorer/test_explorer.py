"""The live object and its widgets, without a browser: what is shown is what the model says."""

from __future__ import annotations

import asyncio
import builtins
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, ResultError, SiteError
from memlens.explorer import widget as widgets
from memlens.explorer.drawing import FIGURES, running_text, tokens_html, written_html
from memlens.explorer.explorer import Explorer
from memlens.explorer.measuring import ExploreOptions, explore_sequences, planned_steps
from memlens.figures.theme import DARK_TEMPLATE
from tests.explorer.synthetic import view
from tests.report.test_render import NASTY


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def planted(pythia: Any) -> ml.SequenceSet:
    seqs = ml.load_sequences("zoo", pythia)
    copies = seqs.table["copies"].to_numpy()
    return seqs[[*np.flatnonzero(copies == 256)[:2], *np.flatnonzero(copies == 1)[:1]]]


@pytest.fixture
def explorer(pythia: Any, planted: ml.SequenceSet) -> Explorer:
    return ml.explore(pythia, planted)


def generated(model: Any, seqs: ml.SequenceSet, row: int) -> str:
    """TransformerLens' own decoding after the prefix."""
    prefix, n = seqs.tokens[[row], : int(seqs.prefix_len[row])], int(seqs.n_targets[row])
    out = model.generate(
        prefix, max_new_tokens=n, do_sample=False, verbose=False, stop_at_eos=False, prepend_bos=False
    )
    return model.tokenizer.decode(out[0, prefix.shape[1] :])


def test_what_is_written_is_what_the_model_generates(
    explorer: Explorer, pythia: Any, planted: ml.SequenceSet
) -> None:
    assert explorer.selected == planted.ids[0]
    assert explorer.continuation.recalled
    assert explorer.continuation.text == generated(pythia, planted, 0) == explorer.view.target_text
    explorer.toggle(1).toggle(3)
    with ml.bypassed(pythia, [1, 3]):
        assert explorer.continuation.text == generated(pythia, planted, 0)
    assert not explorer.continuation.recalled
    explorer.select(planted.ids[2])
    with ml.bypassed(pythia, [1, 3]):
        assert explorer.continuation.text == generated(pythia, planted, 2)
    explorer.toggle(3).toggle(1)
    assert explorer.edits.name == "unchanged model"
    assert explorer.continuation.text == generated(pythia, planted, 2)


def test_colors_under_an_ablation_are_those_of_a_plain_forward(
    explorer: Explorer, pythia: Any, planted: ml.SequenceSet
) -> None:
    def edit(z: torch.Tensor, hook: Any) -> torch.Tensor:
        out = z.clone()
        out[:, :, 3] = (z.sum(2) - z[:, :, 3]) / 7
        return out

    ids, p = planted.rows()[0], int(planted.prefix_len[0])
    logits = pythia.run_with_hooks(torch.tensor([ids]), fwd_hooks=[("blocks.1.attn.hook_z", edit)])
    expected = logits[0, p - 1 : -1].softmax(-1)[torch.arange(len(ids) - p), torch.tensor(ids[p:])]
    found = explorer.toggle(1, 3).continuation.probability
    assert np.allclose(found, expected.detach().numpy(), atol=1e-5)
    assert np.abs(found - explorer.view.continuation.probability).max() > 0.005


def test_attention_is_of_the_selected_head_and_the_unchanged_model(
    explorer: Explorer, pythia: Any, planted: ml.SequenceSet
) -> None:
    explorer.select_head(2, 5).toggle(0)
    _, cache = pythia.run_with_cache(planted.tokens[:1], names_filter="blocks.2.attn.hook_pattern")
    pattern = cache["blocks.2.attn.hook_pattern"][0, 5].detach().numpy()
    assert np.abs(explorer.attention / 255 - pattern).max() <= 1 / 510 + 1e-5
    shown = explorer.figure("attention").data[0]
    assert np.allclose(np.nan_to_num(shown.z), np.tril(explorer.attention) / 255)
    assert shown.x[0] != shown.x[1]


def test_the_first_head_is_the_one_that_matters_most(explorer: Explorer) -> None:
    effects = explorer.view.head_effects
    assert effects[explorer.head] == effects.min()


def test_all_sequences_are_scored_and_the_rest_waits(explorer: Explorer, planted: ml.SequenceSet) -> None:
    assert explorer.table["exact_match"].tolist() == [1, 1, 0]
    assert list(explorer.table["id"]) == planted.ids
    assert explorer._views == {}


def test_what_does_not_exist_is_refused_and_changes_nothing(explorer: Explorer) -> None:
    with pytest.raises(SiteError, match=rf"no sequence 'nowhere' among these 3: '{explorer.ids[0]}', '"):
        explorer.select("nowhere")
    with pytest.raises(SiteError, match="layer 6"):
        explorer.toggle(6)
    with pytest.raises(SiteError, match="head 8"):
        explorer.toggle(0, 8)
    with pytest.raises(SiteError, match="head 9"):
        explorer.select_head(0, 9)
    with pytest.raises(OptionError, match="kind='heads'"):
        explorer.figure("heads")
    with pytest.raises(SiteError, match="no sequence 'x'"):
        explorer.exploration(["x"])
    assert not explorer.edits


def test_menus_and_switches_show_what_the_model_says(explorer: Explorer, planted: ml.SequenceSet) -> None:
    widget = explorer.widget
    assert [value for _, value in widget.sequence.options] == planted.ids
    assert widget.sequence.options[0][0] == f"{planted.ids[0]} · 100% of targets right"
    plain = widget.tokens.value
    assert plain == tokens_html(explorer.view, explorer.continuation)
    widget.bypass[1].value = True
    widget.ablate.value = True
    head = explorer.head
    assert (explorer.edits.bypassed, explorer.edits.ablated) == ((1,), (head,))
    assert widget.tokens.value == tokens_html(explorer.view, explorer.continuation) != plain
    assert widget.written.value.endswith(written_html(explorer.view, explorer.continuation))
    assert f"bypass L1 + ablate L{head[0]}H{head[1]}" in widget.written.value
    widget.sequence.value = planted.ids[2]
    assert explorer.selected == planted.ids[2]
    assert np.allclose(widget.figures["lens"].data[0].z, explorer.view.lens_probability)
    widget.clear.click()
    assert not explorer.edits
    assert not any(button.value for button in (*widget.bypass, widget.ablate))


def test_the_steps_of_a_measurement_are_shown_while_it_runs(
    explorer: Explorer, planted: ml.SequenceSet
) -> None:
    widget, seen = explorer.widget, []
    explorer.on_step(
        lambda step: seen.append((step, widget.progress.description, widget.progress.layout.visibility))
    )
    widget.sequence.value = planted.ids[1]
    assert seen == [*((step, step, "visible") for step in explorer.steps), ("", "", "hidden")]
    widget.sequence.value = planted.ids[0]  # measured before
    assert len(seen) == len(explorer.steps) + 1


def test_in_a_kernel_the_effects_come_after_the_first_draw(
    pythia: Any, planted: ml.SequenceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and lens are drawn first, then each portion, between which a user's choices are heard."""
    monkeypatch.setattr(widgets, "_AT_ONCE", 0)
    whole = explore_sequences(pythia, planted, ExploreOptions(), try_edits=False, progress=False)
    explorer = ml.explore(pythia, planted)
    drawn: list[int] = []

    def measured() -> int:
        z = np.array(explorer.widget.figures["effects"].data[0].z, dtype=float)
        assert (np.isnan(z) == np.isnan(explorer.shown.head_effects)).all()
        return int(np.isfinite(z).sum())

    async def kernel() -> None:
        widget = explorer.widget
        assert measured() == 0
        assert np.allclose(widget.figures["lens"].data[0].z, whole.views[0].lens_probability)
        assert widget.written.value.startswith(written_html(whole.views[0], whole.views[0].continuation))
        explorer.toggle(1)
        assert "bypass L1" in widget.written.value
        assert measured() == 0  # the switch did not wait for effects
        while not explorer.complete:
            await asyncio.sleep(0.01)
            drawn.append(measured())
            if drawn[-1] and explorer.selected == planted.ids[0]:
                widget.sequence.value = planted.ids[2]
        assert widget.progress.layout.visibility == "hidden"

    asyncio.run(kernel())
    assert {0, 48} < set(drawn)
    assert explorer.selected == planted.ids[2]
    assert explorer.head == explorer.shown_head
    found, wanted = explorer.view, whole.views[2]
    for name in ("head_effects", "mlp_effects", "bypass_effects"):
        assert np.allclose(getattr(found, name), getattr(wanted, name), atol=1e-5), name
    left = explorer.select(planted.ids[0])  # no kernel any more: measured at once
    assert left.complete
    assert np.allclose(left.view.head_effects, whole.views[0].head_effects, atol=1e-5)


def test_a_model_that_changes_stops_the_measurement_visibly(
    planted: ml.SequenceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widgets, "_AT_ONCE", 0)
    model = ml.load_model("zoo/pythia-xs")
    explorer = ml.explore(model, ml.load_sequences("zoo", model)[:1])

    async def kernel() -> None:
        progress = explorer.widget.progress
        with torch.no_grad():
            model.W_U[0, 0] += 1
        await asyncio.sleep(0.2)
        assert (progress.description, progress.bar_style) == ("stopped", "danger")
        assert "the model has changed" in progress.tooltip

    asyncio.run(kernel())
    with pytest.raises(ResultError, match="the model has changed"):
        _ = explorer.view


def test_an_interrupted_measurement_begins_anew(
    pythia: Any, planted: ml.SequenceSet, explorer: Explorer
) -> None:
    def interrupt(step: str) -> None:
        if step.startswith("heads") and not hits:
            hits.append(step)
            raise KeyboardInterrupt

    hits: list[str] = []
    explorer.on_step(interrupt)
    with pytest.raises(KeyboardInterrupt):
        _ = explorer.view
    assert not explorer.complete
    assert np.isnan(explorer.shown.head_effects).all()
    assert np.isfinite(explorer.view.head_effects).all()


def test_portions_of_heads_cost_about_the_same() -> None:
    """A head of layer l of n costs 1 - l / n forward passes."""
    model = ml.load_model("zoo/pythia-s")
    names = planned_steps(model, ExploreOptions())
    assert names[-2:] == ["heads of layers 0-2", "heads of layers 3-5"]
    assert planned_steps(model, ExploreOptions(ablation="mean"))[-1] == "heads of layers 0-5"


def test_the_two_percentages_are_named_apart(explorer: Explorer, planted: ml.SequenceSet) -> None:
    explorer.select(planted.ids[2])
    one = explorer.continuation
    right, score = one.correct.mean(), one.memorization_score
    assert right != score
    assert f"{right:.0%} of targets right" in explorer.widget.sequence.options[2][0]
    said = explorer.widget.written.value
    assert f"of the targets {right:.0%} are right, each after the true tokens before it" in said
    assert f"{score:.0%} of the tokens are (memorization score)" in said


def test_widget_messages_are_strict_json_though_attention_has_no_value_above_the_diagonal(
    explorer: Explorer, planted: ml.SequenceSet
) -> None:
    assert np.isnan(np.array(explorer.figure("attention").data[0].z, dtype=float)).any()
    shown = explorer.widget.plots.shown  # the first draw
    first = shown["attention"].value
    explorer.select(planted.ids[1])
    assert shown["attention"].value != first
    for kind in FIGURES:
        assert "NaN" not in shown[kind].value
        (z, *_) = [trace["z"] for trace in json.loads(shown[kind].value)["data"]]
        np.testing.assert_array_equal(np.array(z, dtype=float), explorer.figure(kind).data[0].z)


def test_plotlys_script_is_no_part_of_the_module_that_must_load_in_two_seconds(explorer: Explorer) -> None:
    state = explorer.widget.plots.get_state()
    assert "Plotly" in state["script"]
    assert len(state["_esm"]) < 10_000
    shown = [one for one in explorer.widget.box.children if hasattr(one, "_esm")]
    assert shown == [explorer.widget.plots]


def click(explorer: Explorer, kind: str, trace: int, row: int, column: int) -> None:
    """What the script in the browser sends when a cell of a heat map is clicked."""
    content = {"clicked": kind, "trace": trace, "cell": [row, column]}
    explorer.widget.plots._handle_custom_msg(content, [])


def test_a_click_on_a_head_shows_its_attention(explorer: Explorer) -> None:
    widget = explorer.widget
    click(explorer, "effects", 0, 3, 6)
    assert explorer.head == (3, 6)
    assert (widget.layer.value, widget.head.value) == (3, 6)
    effects, attention = widget.figures["effects"], widget.figures["attention"]
    assert attention.layout.title.text == "Attention of L3H6 in the unchanged model"
    assert np.allclose(
        np.nan_to_num(np.array(attention.data[0].z, dtype=float)), np.tril(explorer.attention) / 255
    )
    assert (effects.layout.shapes[0].x0, effects.layout.shapes[0].y0) == (5.5, 2.5)
    click(explorer, "effects", 0, 3, 7)  # still heard after the figure was drawn anew
    assert explorer.head == (3, 7)
    assert widget.ablate.description == "ablate L3H7"
    click(explorer, "attention", 0, 1, 2)  # a pair of tokens is no head
    assert explorer.head == (3, 7)


def test_a_click_on_the_column_of_bypasses_switches_one(explorer: Explorer) -> None:
    widget = explorer.widget
    click(explorer, "effects", 1, 2, 1)
    assert explorer.edits.bypassed == (2,)
    assert widget.bypass[2].value is True
    click(explorer, "effects", 1, 2, 0)  # the MLP column is no switch
    assert explorer.edits.bypassed == (2,)


def test_calls_in_python_show_in_the_widgets(explorer: Explorer, planted: ml.SequenceSet) -> None:
    widget = explorer.widget
    explorer.select(planted.ids[1]).toggle(4).select_head(0, 1)
    assert widget.sequence.value == planted.ids[1]
    assert [button.value for button in widget.bypass] == [False] * 4 + [True, False]
    assert (widget.layer.value, widget.head.value) == (0, 1)
    assert widget.figures["attention"].layout.title.text == "Attention of L0H1 in the unchanged model"


def test_a_dark_explorer_stays_dark_and_shows_the_same(
    pythia: Any, planted: ml.SequenceSet, explorer: Explorer
) -> None:
    night = ml.explore(pythia, planted, dark=True)
    for kind in ("lens", "effects", "attention"):
        assert night.figure(kind).layout.template == DARK_TEMPLATE
        assert explorer.figure(kind).layout.template != DARK_TEMPLATE
        np.testing.assert_array_equal(night.figure(kind).data[0].z, explorer.figure(kind).data[0].z)
    widget = night.widget
    night.select(planted.ids[1]).select_head(0, 1)
    for kind, shown in widget.figures.items():
        assert shown.layout.template.layout.paper_bgcolor == DARK_TEMPLATE.layout.paper_bgcolor
        z = np.array(shown.data[0].z, dtype=float)
        np.testing.assert_array_equal(z, night.figure(kind).data[0].z)


def test_jupyter_is_given_a_widget(explorer: Explorer) -> None:
    found = explorer._repr_mimebundle_()
    data = found[0] if isinstance(found, tuple) else found
    assert data["text/plain"] == f"Explorer(3 sequences, at '{explorer.selected}', unchanged model)"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.widget.box.model_id


def test_without_ipywidgets_the_message_says_what_to_install(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "ipywidgets" or name == "memlens.explorer.widget":
            raise ModuleNotFoundError("No module named 'ipywidgets'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"pip install 'memlens\[notebook\]'"):
        _ = explorer.widget
    assert "memlens[notebook]" in explorer._repr_mimebundle_()["text/plain"]
    assert explorer.toggle(0).continuation.text


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY.keys())
def test_text_of_sequences_stays_text(text: str) -> None:
    one = view("a", ["given " + text, text, " and"], 1, wrong=text)
    for shown in (tokens_html(one, one.continuation), written_html(one, one.continuation)):
        assert "<script" not in shown
        assert "<img" not in shown
        assert "<b>bold" not in shown
        assert html.escape(running_text(text)) in shown


def test_the_page_of_an_explorer_shows_its_sequences(
    explorer: Explorer, planted: ml.SequenceSet, tmp_path: Path
) -> None:
    page = explorer.write_html(tmp_path / "page.html", planted.ids[:1])
    text = page.read_text(encoding="utf-8")
    assert planted.ids[0] in text
    assert planted.ids[1] not in text
    assert page.stat().st_size < 8_000_000


@pytest.mark.slow
def test_a_notebook_shows_the_explorer(tmp_path: Path) -> None:
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    code = "import memlens as ml\nmodel = ml.load_model('zoo/pythia-s')\n"
    code += "explorer = ml.explore(model, ml.load_sequences('zoo', model)[-2:])\nexplorer"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    client.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    (shown,) = [out for out in book.cells[0].outputs if out.output_type == "execute_result"]
    assert "application/vnd.jupyter.widget-view+json" in shown.data
    state = book.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    models = {entry["model_name"] for entry in state.values()}
    assert {"DropdownModel", "ToggleButtonModel", "HTMLModel"} <= models
