"""Which token `localize` replaces: one whose cue has to travel."""

from __future__ import annotations

from pathlib import Path

import pytest

import memlens as ml
from tests.devices import dev


@pytest.mark.slow
def test_the_replaced_token_is_not_the_one_that_predicts(tmp_path: Path) -> None:
    model = ml.load_model("zoo/pythia-s", device=dev())
    seqs = ml.load_sequences("zoo", model)
    few = seqs[(seqs.table["copies"].isin([0, 256]) & (seqs.table["domain"] == "text")).to_numpy()]
    options = ml.studies.LocalizeOptions(
        max_sequences=4, max_patched=4, max_positions=4, untrained_control=False, explored_memorized=0,
        explored_controls=0, ranked_sequences=1, most_forwards=0,
    )  # fmt: skip
    run = ml.localize(model, few, tmp_path, options=options, progress=False)
    assert run.failures == {}
    data = ml.load_result(tmp_path / "activation_patching.nc").data
    patched = data.isel(sequence=data["group"].values == "memorized")
    lost = (patched["target_logprob_clean"] - patched["target_logprob_corrupt"]).sum()
    gained = (patched["target_logprob"] - patched["target_logprob_corrupt"]).sum("sequence") / lost
    cue = gained.sel(position=30)  # the prefix has 32 tokens; the first target is predicted at 31
    assert float(cue[0]) == pytest.approx(1, abs=1e-3)
    assert float(cue[-1]) < 0.5
