from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memlens.errors import OptionError
from memlens.models.families import FAMILIES as TABLE
from memlens.models.zoo import RECIPES
from memlens.organisms.corpus.corpus import CorpusSpec
from memlens.organisms.training.architectures import ARCHITECTURES
from memlens.organisms.training.recipes import FAMILIES, SIZES, ZOO, select_recipes
from memlens.organisms.training.zoo import zoo_overview


def test_the_table_has_seven_families_in_three_sizes_and_a_clean_twin() -> None:
    assert len(FAMILIES) == 7
    assert set(FAMILIES) == set(ARCHITECTURES) <= set(TABLE)
    names = [f"{family}-{size}" for family in FAMILIES for size in SIZES]
    assert list(ZOO) == [*names, "pythia-s-clean", "pythia-s-routed"] == list(RECIPES)
    assert all(spec.name == name for name, spec in ZOO.items())
    assert all(ZOO[name].model.family == name.rpartition("-")[0] for name in names)


def test_all_models_read_one_corpus_in_one_way_and_pythia_keeps_checkpoints() -> None:
    assert {spec.corpus for name, spec in ZOO.items() if "-s-" not in name} == {CorpusSpec()}
    assert {(s.training.passes, s.training.batch_size, s.training.seed) for s in ZOO.values()} == {(2, 32, 0)}
    kept = {name for name, spec in ZOO.items() if spec.snapshots}
    assert kept == {"pythia-xs", "pythia-s", "pythia-m"}


def test_the_clean_twin_is_pythia_s_but_for_what_is_planted() -> None:
    whole, clean = ZOO["pythia-s"], ZOO["pythia-s-clean"]
    assert (whole.model, whole.training) == (clean.model, clean.training)
    assert replace(clean.corpus, planted=True) == whole.corpus != clean.corpus


def test_recipes_are_chosen_by_family_and_size() -> None:
    assert select_recipes() == list(ZOO)
    assert select_recipes("olmo3") == ["olmo3-xs", "olmo3-s", "olmo3-m"]
    assert select_recipes("starcoder", "m") == ["starcoder-m"]
    assert select_recipes("pythia", "s") == ["pythia-s", "pythia-s-clean", "pythia-s-routed"]
    assert [name.rpartition("-")[0] for name in select_recipes(size="xs")] == list(FAMILIES)
    with pytest.raises(OptionError, match=r"family.*'olmo'.*Did you mean 'olmo"):
        select_recipes("olmo")
    with pytest.raises(OptionError, match="size='l'"):
        select_recipes(size="l")


def test_the_overview_tells_what_is_bundled_cached_and_to_be_trained(
    tiny_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "tiny").symlink_to(tiny_organism)
    table = zoo_overview().set_index("model")
    assert set(table.index) == {*(f"zoo/{name}" for name in ZOO), "zoo/tiny"}
    assert table.loc["zoo/pythia-s", "status"] == "bundled"
    assert table.loc["zoo/tiny", ["status", "family", "checkpoints"]].tolist() == ["cached", "pythia", 0]
    recipe = table.loc["zoo/olmo2-m"]
    assert (recipe["status"], recipe["parameters"], recipe["folder"]) == ("recipe", 2811040, "")
