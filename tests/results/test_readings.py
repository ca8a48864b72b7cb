"""Each reading against numbers worked out by hand; equal values have intervals of no width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from memlens.results.groups import join_groups
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.results.statistics.tradeoff import join_frontier
from tests.results.test_tradeoff import recall_result, task_result

N = 4


def made(
    kind: str, variables: dict[str, Any], coords: dict[str, Any] | None = None, **settings: Any
) -> Result:
    """Return a result; a variable is (dimensions after `sequence`, values per sequence or for all)."""
    arrays = {}
    for name, (dims, values) in variables.items():
        array = np.asarray(values, float)
        if array.ndim == len(dims):
            array = np.broadcast_to(array, (N, *array.shape))
        arrays[name] = (("sequence", *dims), array)
    return Result.create(xr.Dataset(arrays, coords), kind=kind, settings=settings)


HEADS = [[0.0, -0.5], [-2.0, 0.25]]  # layer 1, head 0 harms most; layer 1, head 1 helps


def heads(name: str = "target_logprob", kind: str = "head_ablation", sign: float = 1.0) -> Result:
    values = -1.0 + sign * np.array(HEADS)
    return made(kind, {name: (("layer", "head"), values), f"{name}_baseline": ((), -1.0)},
                {"layer": [0, 1], "head": [0, 1]})  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["head_ablation", "mlp_ablation", "attention_bypass", "neuron_ablation", "sweep"]
)
def test_the_most_harmful_site(kind: str) -> None:
    assert reading(heads(kind=kind)) == (
        "Recall is harmed most at layer 1, head 0: the target log-prob there changes by -2 nats (95 "
        "% interval "
        "-2 to -2), mean over 4 sequences, against the unchanged model. The interval excludes 0 at 3 of 4 "
        "sites; hardly any would by chance if nothing mattered. The site named is the most extreme of "
        "them, which "
        "overstates it."
    )


def test_where_less_is_better_harm_is_a_rise() -> None:
    said = reading(heads("target_rank", sign=-1.0))
    assert said.startswith(
        "Recall is harmed most at layer 1, head 0: the target rank there changes by 2 (95 %"
    )


def test_a_metric_without_a_direction_changes_and_does_not_harm() -> None:
    said = reading(heads("loss"))
    assert said.startswith("The change is largest at layer 1, head 0: the loss there changes by -2 (95 %")
    assert "harm" not in said


def test_no_harm_anywhere_is_said() -> None:
    said = reading(made("mlp_ablation", {"target_logprob": (("layer",), [0.5, 0.25]),
                                         "target_logprob_baseline": ((), 0.0)}))  # fmt: skip
    assert said.startswith(
        "No site harms recall on average: even at layer 1 the target log-prob changes by 0.25"
    )


@pytest.mark.parametrize(("n", "why"), [(1, "one sequence is too few"), (2, "2 sequences are too few")])
def test_one_or_two_sequences_give_no_interval_and_say_why(n: int, why: str) -> None:
    said = reading(Result(heads().data.isel(sequence=slice(0, n))))
    assert f"changes by -2 nats (no interval: {why})" in said
    assert "excludes" not in said


def test_an_interval_that_holds_0_is_said_to() -> None:
    values = np.array([[-3.0], [2.0], [-2.0], [2.5]])
    said = reading(made("sweep", {"target_logprob": (("intervention",), values),
                                  "target_logprob_baseline": ((), 0.0)}))  # fmt: skip
    assert "changes by -0.125 nats" in said
    assert "That interval includes 0: this may be no effect at all." in said


def test_knock_outs_stand_beside_their_control() -> None:
    values = np.zeros((2, 1, 1, 2))  # layer, window, k, selection
    values[1, 0, 0] = 1.0, 0.25
    result = made(
        "neuron_knockout",
        {"prediction_flipped": (("layer", "window", "k", "selection"), values),
         "prediction_flipped_baseline": ((), 0.0)},
        {"layer": [0, 1], "window": [1], "k": [10], "selection": ["dominant", "random"]},
    )  # fmt: skip
    said = reading(result)
    assert said.startswith(
        "With dominant: recall is harmed most at layer 1, window 1, k 10: the share of sequences with the "
        "prediction flipped there changes by 1 (95 %"
    )
    assert (
        "There random changes it by 0.25 (95 % interval 0.25 to 0.25); the difference is 0.75 (95 %" in said
    )
    # A share of flips cannot be below 0: how many intervals lie above it says nothing.
    assert "excludes 0" not in said
    assert "The site named is the most extreme of 2, which overstates it." in said


def test_the_second_control_is_named_in_words() -> None:
    values = np.zeros((2, 2))  # layer, edit
    variables = {"target_logprob": (("layer", "edit"), values - 1.0), "target_logprob_baseline": ((), 0.0)}
    result = made("bypass_controls", variables, {"edit": ["identity", "mlp_zero"], "layer": [0, 1]})
    assert "There MLP zero changes it by" in reading(result)


def test_bypass_controls_compare_the_first_edit_with_the_others_at_its_layer() -> None:
    values = [[-1.0, -3.0], [-0.5, -1.0]]
    variables = {"target_logprob": (("edit", "layer"), values), "target_logprob_baseline": ((), 0.0)}
    result = made("bypass_controls", variables, {"edit": ["bypass", "mlp"], "layer": [0, 1]})
    said = reading(result)
    assert said.startswith(
        "With bypass: recall is harmed most at layer 1: the target log-prob there changes by -3 nats"
    )
    assert "There MLP changes it by -1 nats (95 % interval -1 to -1); the difference is -2 nats" in said


def test_groups_are_read_at_the_site_of_the_first() -> None:
    joined = join_groups({"memorized": heads(), "control": heads(sign=0.5)})
    said = reading(joined)
    assert said.startswith("In memorized: recall is harmed most at layer 1, head 0")
    assert said.endswith(
        "In control it changes by -1 nats (95 % interval -1 to -1) there, mean over 4 sequences."
    )


def test_sets_are_named_with_a_caution_on_size() -> None:
    variables = {"exact_match": (("layers",), [0.5, 0.0]), "exact_match_baseline": ((), 1.0)}
    result = made("bypass_sets", variables, {"layers": ["0", "0,2-3"]})
    said = reading(result)
    assert "harmed most at layers 0,2-3: the exact match there changes by -1 (95 % interval -1 to -1)" in said
    assert said.endswith("Larger sets tend to change more: compare sets of one size.")


def pairs() -> Result:
    labels = ["L0H0", "L0H1", "L1H0"]
    interaction = np.array([[np.nan, -0.5, 0.25], [-0.5, np.nan, 0.1], [0.25, 0.1, np.nan]])
    return made(
        "head_pair_ablation",
        {"target_logprob": (("head_a", "head_b"), np.zeros((3, 3))), "target_logprob_baseline": ((), 0.0),
         "interaction": (("head_a", "head_b"), interaction)},
        {"head_a": labels, "head_b": labels},
    )  # fmt: skip


def test_pairs_are_counted_once_and_the_strongest_named() -> None:
    assert reading(pairs()).startswith(
        "Of 3 pairs, L0H0 and L0H1 interact most: ablating both changes the target log-prob by -0.5 "
        "nats (95 % "
        "interval -0.5 to -0.5) beyond the sum of each alone: together they harm more than the sum of both "
        "(mean over 4 sequences). The interval excludes 0 at 3 of 3 sites"
    )


def test_cumulative_ablation_beside_random_orders() -> None:
    values = np.array([[0.5, 0.0], [1.0, 0.5], [1.0, 1.0]])  # order by count
    result = made(
        "cumulative_head_ablation",
        {"exact_match": (("order", "n_ablated"), values), "exact_match_baseline": ((), 1.0),
         "heads_until_lost": (("order",), np.array([[2.0] * 3, [2.0] * 3, [4.0] * 3, [np.nan] * 3]))},
        {"order": ["ranked", "random 0", "random 1"], "n_ablated": [2, 4]},
    )  # fmt: skip
    said = reading(result)
    assert said.startswith("With the 4 highest ranked heads ablated the exact match is 0 (95 % interval 0 to")
    assert "the unchanged model's is 1 (95 % interval" in said
    assert (
        "(the mean of 2 orders) it is 0.75 (95 % interval 0.75 to 0.75); ranked minus random is -0.75" in said
    )
    assert "In the ranked order 3 of 4 recalled sequences are lost, at a median of 2 heads" in said


@pytest.mark.parametrize(
    ("kind", "x", "words"),
    [
        ("residual_perturbation", "alpha", "noise strength α = 8"),
        ("prefix_perturbation", "replaced", "8 replaced prefix tokens"),
        ("extraction_curve", "prefix_len", "8 prefix tokens given"),
        ("recall_over_training", "step", "8 training steps"),
    ],
)
def test_strengths_compare_the_ends_on_the_sequences_that_have_both(kind: str, x: str, words: str) -> None:
    values = np.array([[2.0, 1.0, 0.0], [2.0, 2.0, 2.0], [2.0, 1.0, 0.0], [np.nan, 1.0, 0.0]])
    result = made(
        kind, {"matching_prefix": ((x,), values), "matching_prefix_baseline": ((), 2.0)}, {x: [8, 16, 32]}
    )
    said = reading(result, "matching_prefix")
    assert said.startswith(f"With {words} the matching prefix is 2 tokens (95 % interval 2 to 2)")
    assert "with 32 it is 0.667 tokens (95 % interval 0 to 2); each sequence changes by -1.33 tokens" in said
    assert (
        "mean over 3 sequences. 1 further sequence has no value at one of these ends and is left out." in said
    )
    assert "The unchanged model's is 2 tokens (95 % interval 2 to 2)." in said
    assert said.endswith("includes 0: this may be no change at all.")


def test_one_token_is_no_plural() -> None:
    result = made(
        "extraction_curve", {"matching_prefix": (("prefix_len",), [0.0, 2.0])}, {"prefix_len": [1, 32]}
    )
    assert reading(result).startswith("With 1 prefix token given the matching prefix is 0 tokens")


def test_compression_counts_only_what_is_recalled_from_the_whole_prefix() -> None:
    result = made(
        "prompt_compression",
        {"recalled": ((), [1, 1, 1, 0]), "fewest_tokens": ((), [4, 4, 4, np.nan]),
         "compression_ratio": ((), [0.25, 0.25, 0.25, np.nan]),
         "stable_compression_ratio": ((), [0.5, 0.5, 0.5, np.nan])},
        method="keep_last", budget=None,
    )  # fmt: skip
    assert reading(result) == (
        "3 of 4 sequences are recalled from their whole prefix. For these the fewest tokens that are enough "
        "(keep last) are 4 tokens (95 % interval 4 to 4), a share of 0.25 (95 % interval 0.25 to "
        "0.25) of the "
        "prefix, mean over 3 sequences. From a share of 0.5 (95 % interval 0.5 to 0.5) on, every "
        "longer prompt "
        "that was tried is enough, too."
    )


def patched(**settings: Any) -> Result:
    return made(
        "activation_patching",
        {"target_logprob": (("layer", "position"), [[-3.0, -2.0], [-1.5, -2.5]]),
         "target_logprob_clean": ((), -1.0), "target_logprob_corrupt": ((), -3.0)},
        {"layer": [0, 1], "position": [4, 5]}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["activation_patching", "neuron_patching", "path_patching"])
def test_the_restored_share(kind: str) -> None:
    said = reading(Result(patched().data.assign_attrs(kind=kind)))
    assert said.startswith(  # (-1.5 + 3) / (-1 + 3)
        "Most is restored at layer 1, position 4: recall restored 0.75 (95 % interval 0.75 to 0.75) "
        "(0 is the "
        "corrupt run, 1 the clean one), 4 sequences together."
    )
    noising = reading(patched(direction="noising"))
    assert noising.startswith(
        "The patch leaves the least recall at layer 0, position 4: recall restored 0 (95 %"
    )


def test_a_corruption_that_changed_too_little_is_said_to() -> None:
    data = patched().data.copy()
    data["target_logprob_clean"] = ("sequence", -3.0 + np.array([0.3, -0.3, 0.2, -0.19]))
    said = reading(Result(data))
    assert said.startswith(
        "The corruption changed too little to say what share of it is restored: the clean run's "
        "target log-prob "
        "exceeds the corrupt one's by 0.0025 nats (95 % interval -0.2"
    )
    assert (
        "Most is restored at layer 1, position 4: target log-prob 1.5 nats (95 % interval 1.5 to 1.5)" in said
    )
    assert "share" not in said.split("nats", 1)[1]
    assert all("restored" not in trace.hovertemplate for trace in Result(data).plot().data)


def test_estimates_are_called_that() -> None:
    note = "These effects are estimated from gradients, not measured: verify the largest by running them."
    for result, start in (
        (patched(), "Most is restored at layer 1"),
        (heads(), "Recall is harmed most at layer 1"),
    ):
        said = reading(Result(result.data.assign_attrs(kind="gradient_attribution")))
        assert said.startswith(start)
        assert said.endswith(note)


def test_decoding_says_from_where_on() -> None:
    result = made(
        "residual_decoding",
        {"probability": (("layer", "target"), [[0.1, 0.1], [0.5, 0.3], [0.8, 0.8]]),
         "rank": (("layer", "target"), [[9, 9], [0, 0], [0, 0]])},
    )  # fmt: skip
    assert reading(result) == (
        "After the last layer the target tokens have a mean probability of 0.8 (95 % interval 0.8 to "
        "0.8), mean "
        "over 4 sequences. Half of that is first reached after layer 1. Their geometric mean rank is below 2 "
        "from layer 1 on."
    )


def test_attribution_names_the_largest_parts() -> None:
    result = made(
        "logit_attribution",
        {"heads": (("layer", "head"), [[0.5, 1.5], [-4.0, 1.0]]), "attn": (("layer",), [2.0, -3.0]),
         "mlp": (("layer",), [0.25, 3.0])},
        {"layer": [0, 1], "head": [0, 1]},
    )  # fmt: skip
    said = reading(result)
    assert "the head that adds most is layer 0, head 1, 1.5 logits (95 % interval 1.5 to 1.5)" in said
    assert "the attention that adds most is layer 0, 2 logits" in said
    assert "the MLP that adds most is layer 1, 3 logits" in said


def test_recall_by_copies() -> None:
    result = made("recall", {"exact_match": ((), [1, 1, 1, 0])}, {"copies": ("sequence", [8, 8, 8, 0])})
    assert reading(result) == (
        "The exact match, mean over 4 sequences, is 0.75 (95 % interval 0.301 to 0.954). With 0 "
        "copies it is 0 "
        "(no interval: one sequence is too few), with 8 copies 1 (95 % interval 0.439 to 1)."
    )


def test_bounds_hold_or_do_not() -> None:
    slack = np.array([[[2.0, 8.0]], [[10.0, 10.0]]])  # bound, layer, position: geometric means 4 and 10
    result = made(
        "bypass_bounds", {"slack": (("bound", "layer", "position"), slack)}, {"bound": ["B1", "B2"]}
    )
    assert reading(result) == (
        "All 16 measured changes lie within their bounds. On geometric average the bounds exceed the "
        "changes: B1 "
        "by a factor of 4 (95 % interval 4 to 4); B2 by a factor of 10 (95 % interval 10 to 10), mean over 4 "
        "sequences."
    )
    slack[0, 0, 0] = 0.5
    broken = made(
        "bypass_bounds", {"slack": (("bound", "layer", "position"), slack)}, {"bound": ["B1", "B2"]}
    )
    assert reading(broken).startswith(
        "4 of 16 measured changes exceed their bounds: a bound does not hold there."
    )


def test_a_change_beside_the_bounds_has_a_reading_of_its_own() -> None:
    variables = {"slack": (("bound", "layer"), [[2.0, 2.0]]), "kl": (("layer",), [1.0, 3.0])}
    said = reading(made("bypass_bounds", variables, {"bound": ["B1"], "layer": [0, 1]}), metric="kl")
    assert said == "The kl is largest at layer 1: 3 (95 % interval 3 to 3), mean over 4 sequences."


def test_the_predictor_is_called_a_guess() -> None:
    said = reading(made("bypass_predictor", {"predictor": (("layer",), [1.0, 3.0])}, {"layer": [0, 1]}))
    assert said == (
        "The predictor is largest at layer 1: 3 (95 % interval 3 to 3), mean over 4 sequences. It is "
        "a guess from "
        "one run of the unchanged model, not a measured effect: compare it with a bypass."
    )


TASKS = {"open": ("reasoning", 0.0, [[0, 0, 1]] * 5 + [[0, 1, 1]] * 15, [1.0] * 20)}


def test_tasks_name_the_worst_site_of_each_group() -> None:
    said = reading(task_result(TASKS))
    assert said.startswith(
        "Accuracy, mean over tasks. reasoning (1 task, 20 questions, chance 0): 1 without an "
        "intervention, and "
        "least at layer 0: 0 (95 % interval 0 to 0)."
    )


def test_the_frontier_names_the_most_selective_bypass() -> None:
    recall = recall_result([[0, 0, 1]] * 6 + [[0, 1, 1]] * 4, [1.0] * 10)  # 0, 0.4 and 1 are left
    said = reading(join_frontier({"a": (recall, task_result(TASKS))}, n_resamples=200))  # accuracy 0, 0.75, 1
    assert said.startswith(
        "a: with layer 1 bypassed exact match goes from 1 to 0.4 (95 % interval 0.168 to 0.687)"
    )
    assert "and the accuracy on all tasks from 1 to 0.75 (95 % interval" in said
    assert said.endswith("it was chosen on the same data, which overstates it.")


def test_token_frequencies_of_both_parts() -> None:
    values = np.array([10.0, 20.0, 60.0, 100.0, 5.0])
    said = reading(
        made("token_frequency", {"per_million": (("offset",), values)}, {"offset": [-3, -2, -1, 0, 1]})
    )
    assert said == (
        "The median token of a prefix occurs 20 (95 % interval 20 to 20) times per million, that of "
        "a continuation "
        "52.5 (95 % interval 52.5 to 52.5) times; the difference is 32.5 (95 % interval 32.5 to "
        "32.5), mean over 4 "
        "sequences."
    )
