"""Which tests run on TransformerLens 4.x, too. The two environments differ in no other package.

On 3.9 everything runs. On 4.x are left out:

1. what touches no model of TransformerLens (`WITHOUT_TRANSFORMER_LENS`), and would do the same again;
2. what is composed of parts that their own tests prove on 4.x (`COMPOSED`): of every command and study, of
   the explorer and of the benchmark one run to its end stays (`TO_ITS_END`), and so does what calls
   TransformerLens itself (`CALLS_IT`). Left out are kills, resuming, wrong options, reports, browsers,
   documentation, training, and the examples in docstrings of the same folders of memlens.

Nothing in the folders of `PARTS`, which are those parts, is ever left out.
"""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "memlens"

PARTS = ("forward", "instruments", "models", "sweeps")
"""Folders whose tests all run on every release: they prove what the rest is composed of."""

WITHOUT_TRANSFORMER_LENS = (
    "figures",
    "report",
    "results",
    "sequences",
    "store",
    *(f"organisms/test_{name}.py" for name in ("corpus", "domains", "known_items", "recipes", "shipped")),
    *(f"organisms/test_{name}.py" for name in ("tokenizer", "train")),
    *(f"recall/test_{name}.py" for name in ("calibration", "columns", "criteria")),
    *(f"recall/test_{name}.py" for name in ("criteria_parts", "ngrams", "scores", "windows")),
    *(f"studies/comparative/test_{name}.py" for name in ("heads", "numbers")),
    *(f"test_{name}.py" for name in ("files", "options")),
)
"""Folders and files of statistics, figures, readers, reports, corpora and training: no test in them may make
or run a model of TransformerLens, which is an error."""

BUT = (
    "results/test_restored.py",
    "sequences/test_bos.py",
    "sequences/test_extraction_pairs.py",
    "sequences/test_natural.py",
    "store/test_fingerprint.py",
)
"""Files of those folders that do use models."""

COMPOSED = (
    "benchmark",
    "cli",
    "explorer",
    "hostile",
    "organisms",
    "studies",
    *(f"test_{name}.py" for name in ("architecture", "docs", "extending", "kill_loops", "package")),
    *(f"test_{name}.py" for name in ("readme", "releases")),
)
"""Folders and files of what calls other parts of memlens, and TransformerLens through them alone."""

TO_ITS_END = {
    "benchmark fingerprint": "benchmark/test_running.py::test_the_commands",
    "benchmark run": "benchmark/test_running.py::test_what_is_planted_is_found_and_nothing_is_not",
    "check": "cli/test_check.py::test_a_right_model_exits_with_0",
    "demo": "studies/test_localization.py::test_five_findings_with_numbers_and_controls",
    "edit": "cli/test_edit.py::test_output_vectors_are_searched_on_the_sequences",
    "explore": "explorer/test_explorer.py::test_what_is_written_is_what_the_model_generates",
    "generate": "cli/test_generate.py::test_all_ways_to_generate_under_a_bypass_give_the_same_tokens",
    "lens train": "cli/test_lens.py::test_a_lens_from_token_ids",
    "plan": "cli/test_commands.py::test_plan_names_each_analysis",
    "recall compress": "cli/test_recall.py::test_compression_lists_the_shortest_prompts_first",
    "recall counterfactual": "cli/test_recall.py::test_counterfactual_recall_is_the_difference_to_the_twin",
    "recall curve": "cli/test_recall.py::test_a_curve_is_that_of_python_and_is_written_as_asked",
    "run audit": "studies/test_audit.py::test_those_leak_that_were_planted",
    "run bypass": "studies/test_attention_bypass.py::test_the_command_runs_on_saved_sequences",
    "run comparative": "studies/comparative/test_plan.py::test_a_study_from_a_yaml_file",
    "run detectors": "studies/test_detectors.py::test_every_part_has_a_finding",
    "run idioms": "cli/test_run.py",
    "run localize": "cli/test_commands.py::test_localize_on_a_checkpoint_folder_and_report",
    "score": "cli/test_commands.py::test_score_writes_a_table",
}
"""By command, and `ml.explore`, the run to its end that stays."""

NO_MODEL = (
    *("benchmark localizers", "benchmark publish", "benchmark report", "data list", "data show", "gather"),
    *("models", "organisms plant", "plugins", "report", "zoo list", "zoo train"),
)
"""Commands that make no model of TransformerLens: they list, read what was saved, or train."""

CALLS_IT = (
    "benchmark/test_localizers.py::test_every_localizer_gives_a_finite_number_for_each_component",
    "explorer/test_attention.py",
    "explorer/test_measuring.py",
    "hostile/test_hostile.py::test_hostile_files_are_read_or_refused_by_name",
    "organisms/test_architectures.py::test_each_family_loads_as_itself_with_hugging_face_s_logits",
    "organisms/test_bundled.py::test_a_bundled_model_loads_with_its_lists_and_its_family",
    "organisms/test_bundled.py::test_an_untrained_model_is_that_from_which_training_began",
    "organisms/test_planting.py::test_a_component_without_its_output_weights_is_an_ablated_component",
    "organisms/test_snapshots.py::test_steps_load_by_number_with_the_model_s_tokenizer",
    "test_package.py::test_importing_memlens_is_silent_and_imports_nothing_heavy",
    "test_package.py::test_importing_every_module_prints_nothing",
)
"""Tests of those folders that compare with TransformerLens' own forward or hooks, or load models with it."""


def touches_no_model(path: Path) -> bool:
    """Return whether a file of tests is on the first list."""
    return _within(path, TESTS, WITHOUT_TRANSFORMER_LENS) and not _within(path, TESTS, BUT)


def runs_on_4(path: Path, test: str) -> bool:
    """Return whether a test of a file, or an example of a module of memlens, runs on TransformerLens 4.x."""
    if _within(path, TESTS, COMPOSED) and not touches_no_model(path):
        file = path.relative_to(TESTS).as_posix()
        return not {file, f"{file}::{test}"}.isdisjoint([*TO_ITS_END.values(), *CALLS_IT])
    return not touches_no_model(path) and not _within(path, PACKAGE, (*WITHOUT_TRANSFORMER_LENS, *COMPOSED))


def _within(path: Path, root: Path, names: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(root / name) for name in names)
