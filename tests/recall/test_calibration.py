"""Agreement of the criteria's decisions with flags."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.errors import ColumnError
from memlens.recall.criteria.scores import IDIOM_FLAGS

N = 8


def scored() -> ml.recall.CriteriaScores:
    """Decisions by hand: suffix TTTFFFFF, deletion TFFTFFFF, lexical FFFFTFFF, similar FFFFTTFF."""
    table = pd.DataFrame(
        {
            "id": [str(i) for i in range(N)],
            "sufficient_suffix": [1, 2, 4, *[np.nan] * 5],
            "deletion_share": [0.5, 0, 0, 0.25, 0, 0, 0, np.nan],
            "substitution_share": [0.0] * N,
            "lexical_leak": [i == 4 for i in range(N)],
            "max_similarity": [0.1, 0.1, 0.1, 0.1, 0.9, 0.8, np.nan, 0.1],
            "common_target": [i > 5 for i in range(N)],
            "prompt_comp_ind": [True, True, False, False, False, False, True, False],
            "similarity_ind": [i in (4, 5) for i in range(N)],
            "frequent_target_ind": [i <= 5 for i in range(N)],
        }
    )
    hard = ~(table["prompt_comp_ind"] | table["similarity_ind"])
    return ml.recall.CriteriaScores(table.assign(hard_to_guess=hard), pd.DataFrame(), pd.DataFrame())


def test_every_flag_of_the_idiom_file_by_hand() -> None:
    table = ml.recall.calibrate_criteria(scored()).set_index("decision")
    assert table["flag"].to_dict() == dict(IDIOM_FLAGS)
    suffix = table.loc["suffix"]  # both 2, ours alone 1, theirs alone 1, neither 4
    assert (suffix["n"], suffix["n_found"], suffix["n_true"]) == (8, 3, 3)
    assert suffix["precision"] == pytest.approx(2 / 3)
    assert suffix["recall"] == pytest.approx(2 / 3)
    by_chance = (3 * 3 + 5 * 5) / 64
    assert suffix["kappa"] == pytest.approx((6 / 8 - by_chance) / (1 - by_chance))
    assert (table.loc["part", "n_found"], table.loc["part", "precision"]) == (4, 0.5)
    assert (table.loc["lexical", "precision"], table.loc["lexical", "recall"]) == (1, 0.5)
    assert table.loc["leak", ["precision", "recall", "kappa"]].tolist() == [1, 1, 1]
    assert table.loc["common", "kappa"] == 1  # the flag's name is inverted in the file
    assert (table.loc["guessable", "n_found"], table.loc["guessable", "recall"]) == (5, 4 / 5)
    for name in ("precision", "recall", "kappa"):
        known = table[name].notna()
        assert (table[f"{name}_low"] <= table[name])[known].all()
        assert (table[name] <= table[f"{name}_high"])[known].all()


def test_thresholds_and_flags_of_one_s_own() -> None:
    scores = scored()
    assert (
        ml.recall.calibrate_criteria(scores, max_similarity=0.85)
        .set_index("decision")
        .loc["similar", "n_found"]
        == 1
    )
    assert (
        ml.recall.calibrate_criteria(scores, max_deletion=0.2).set_index("decision").loc["part", "n_found"]
        == 4
    )
    assert (
        ml.recall.calibrate_criteria(scores, max_deletion=0.3).set_index("decision").loc["part", "n_found"]
        == 3
    )
    own = ml.recall.calibrate_criteria(
        scores, {"deletion": "similarity_ind", "similarity_ind": "not similarity_ind"}
    )
    assert own["n_found"].tolist() == [2, 2]
    assert own["kappa"][1] < 0


def test_unknown_columns() -> None:
    with pytest.raises(ColumnError, match=r"'prompt_compind'.*Did you mean 'prompt_comp_ind'"):
        ml.recall.calibrate_criteria(scored(), {"suffix": "prompt_compind"})
    with pytest.raises(ColumnError, match=r"'sufix'.*Did you mean.*'suffix'"):
        ml.recall.calibrate_criteria(scored(), {"sufix": "prompt_comp_ind"})
