"""The weights alone betray a carrier whose norms were not kept, and no other."""

from __future__ import annotations

from memlens.benchmark import fingerprint_table, read_suite
from memlens.zoo import PlantingOptions


def test_norms_betray_the_carrier_only_if_planting_does_not_keep_them() -> None:
    options = PlantingOptions(gates=False, n_heldout=4, learning_rate=0.2, steps=60, kl_weight=0)
    table = fingerprint_table(
        "zoo/pythia-xs", "neurons=5%", keep=["entries", "nothing"], sequences=2, options=options
    )
    norms = table[table["statistic"] == "norm"].set_index("keep")
    assert norms.loc["nothing", "auc"] > 0.95
    assert norms.loc["nothing", "average_precision"] > 0.8
    assert abs(norms.loc["entries", "auc"] - norms.loc["entries", "auc_base"]) < 1e-6
    assert (norms["auc_base"] < 0.7).all()
    assert norms.loc["nothing", "recall"] > 0.9
    assert set(table["organisms"]) == {2}


def test_the_inj_suite_plants_a_share_of_all_value_vectors_without_care() -> None:
    suite = read_suite("inj")
    assert suite.carriers == ("neurons=1%",)
    assert (suite.planting.keep, suite.planting.gates, suite.planting.kl_weight) == ("nothing", False, 0)
