"""`build_memorized_set`: scan a corpus for what a model has memorized.

The corpus is read in a seeded random order, a block at a time; one teacher-forced pass decides for each
window whether greedy decoding gives its continuation (see `memlens.recall.score`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from memlens.errors import FileFormatError, OptionError, ResultError, SequenceError, check_option
from memlens.forward.memory import check_batch_size, rows_per_batch
from memlens.forward.trunk import require_model
from memlens.models.provenance import describe
from memlens.recall.columns import SCORE_COLUMNS
from memlens.recall.corpus.memorized_set import MemorizedSet, assemble_sets
from memlens.recall.corpus.scan import Kept, PredictableRule, ScanRules, scan_block
from memlens.recall.corpus.windows import Block, Windows, open_windows
from memlens.recall.trivial import TrivialRules
from memlens.sequences.checks import check_sequences
from memlens.sequences.parquet import read_parquet, write_parquet
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import model_fingerprint
from memlens.store.keyed_folder import KeyedFolder

_OWN = ("id", "text", "row", "start", "role", "matched_to", "length_difference", "frequency_difference")
"""Columns that the scan itself gives."""


def build_memorized_set(
    model: Any,
    token_source: Any,
    *,
    prefix_len: int = 32,
    suffix_len: int = 32,
    n: int | None = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    out: str | Path | None = None,
    max_rows: int | None = None,
    keep_trivial: bool = False,
    token_counts: Int[np.ndarray, "vocab"] | None = None,
    stride: int | None = None,
    below: float = 0.5,
    predictable: PredictableRule | None = None,
    rules: TrivialRules | None = None,
    on_eos: str = "drop",
    tokens_column: str | None = None,
    pool_size: int = 20_000,
    block_size: int = 1024,
    progress: bool = True,
) -> MemorizedSet:
    """Scan a corpus for what a model has memorized, and choose controls from the same scan.

    A window is its first `prefix_len` tokens, given, and the `suffix_len` after them. It is memorized where
    greedy decoding gives them all (discoverable extraction), which one forward pass decides. Kept are those
    whose continuation was not kept before and does not follow by rule (`trivial_continuations`).

    Controls are matched one to one, from up to `pool_size` candidates each: distinct, not trivial, and none
    with the continuation of a memorized sequence. What is predictable is not among the unmemorized.

    Args:
        model: A TransformerLens model. Hooks that are set on it act as in any of its forward passes.
        token_source: Token ids of the model's tokenizer: `[row, token]` or one long `[token]` array (also
            memory-mapped), the path of a `.npy` file of one, a `SequenceSet` (whose own prefix lengths do not
            count), a table or dataset with a column of ids, or any iterable of rows. Iterables without a
            length are shuffled within blocks only; a resumed scan needs the same rows from the first on.
        prefix_len: Tokens given to the model.
        suffix_len: Tokens that must match.
        n: Stop after the block with the n-th memorized sequence; None for all of the source. Controls are
            found on the way, so there may be too few where nearly all is memorized.
        seed: Of the order of windows, and of ties between controls.
        batch_size: Windows per forward pass; chosen to a memory budget by default, and kept where a scan goes
            on. Exact matches with a lead of rounding size (`near_tie`) may depend on it.
        out: A folder in which finished blocks are kept, and the set in the end. The same call goes on with an
            interrupted scan, or with a finished one where `n` or `max_rows` is greater.
        max_rows: Read at most this many rows (windows, for an array).
        keep_trivial: Keep continuations that follow by rule; the column `trivial` marks them.
        token_counts: How often each id occurs in the training corpus (see `memlens.recall.token_counts`), for
            matching; by default it is counted in the windows of the scan.
        stride: Tokens from one window of a row to the next. By default only the first window of a row counts,
            as in the published lists; one long text is cut into windows that do not overlap.
        below: Unmemorized are windows with a smaller share of right tokens (teacher-forced).
        predictable: Which windows are predictable.
        rules: Which continuations are trivial.
        on_eos: "drop" windows that continue with an end-of-text token, or "keep" them.
        tokens_column: The column of ids of a table or dataset.
        pool_size: Candidates for each set of controls: the first that the scan meets.
        block_size: Rows between two savings. Batches never go beyond a block.
        progress: Show a progress bar.

    Returns:
        The three sets, counts and settings. The sets' tables have the columns of a `SequenceSet` that was
        scanned, `row` and `start`, the scores of `score_recall`, how trivial a continuation is, and of
        controls `matched_to` and the differences. With a warning, all sets are empty where nothing is
        memorized.

    Raises:
        OptionError: A number out of range.
        SequenceError: A window longer than the context, or a source that holds no token ids.
        VocabularyError: An id outside the vocabulary, or a set that another tokenizer made.
        ResultError: `out` holds another scan, or the source has changed since.
        SourceNotFoundError, FileFormatError, ColumnError: The source cannot be read.

    Source: the exact-match set, prefix and suffix lengths as in arXiv 2501.05078; how it is built is not
    published. Controls, their matching and all thresholds are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> corpus = ml.load_sequences("zoo", model).tokens[-40:].numpy()
        >>> found = ml.recall.build_memorized_set(model, corpus, n=5, progress=False)
        >>> len(found.memorized), found.counts["windows"]
        (5, 40)
    """
    require_model(model)
    check_batch_size(batch_size)
    check_option("on_eos", on_eos, ["drop", "keep"])
    numbers = {"prefix_len": prefix_len, "suffix_len": suffix_len, "n": n, "max_rows": max_rows,
               "stride": stride, "pool_size": pool_size, "block_size": block_size}  # fmt: skip
    _check_numbers(model, numbers, below)
    _check_counts(model, token_counts)
    windows = _windows(model, token_source, prefix_len + suffix_len, stride, tokens_column)
    predictable, rules = predictable or PredictableRule(), rules or TrivialRules()
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None) if on_eos == "drop" else None
    size = min(batch_size or _batch_size(model, prefix_len + suffix_len, out), block_size)
    settings = {
        **numbers,
        "seed": seed,
        "below": below,
        "keep_trivial": keep_trivial,
        "on_eos": on_eos,
        **predictable.settings(),
        **rules.settings(),
        "source": _source_name(token_source),
        "source_kind": windows.kind,
        "token_counts": "counted in the scan" if token_counts is None else "given",
        **numerics(model, size),
    }
    store = None if out is None else ScanStore(out, _about(model, windows, settings))
    scan_rules = ScanRules(prefix_len, below, predictable, rules, keep_trivial, eos, pool_size)
    scan = _Scan(model, windows, scan_rules, size, store)
    kept, counted = scan.run(seed, block_size, max_rows, n, progress)
    counts = counted if token_counts is None else np.asarray(token_counts)
    found = assemble_sets(model, kept, counts, settings)
    if out is not None:
        found.save(out)
    return found


@dataclass(frozen=True)
class _Scan:
    """The loop over blocks."""

    model: Any
    windows: Windows
    rules: ScanRules
    batch_size: int
    store: ScanStore | None

    def run(
        self, seed: int, size: int, limit: int | None, n: int | None, progress: bool
    ) -> tuple[Kept, Int[np.ndarray, "vocab"]]:
        """Return what was kept, and how often each id stood in a window."""
        kept = Kept()
        counted = np.zeros(self.model.cfg.d_vocab, dtype=np.int64)
        known = [value for value in (self.windows.n_rows, limit) if value is not None]
        with tqdm(total=min(known, default=None), desc="scanning", unit="row", disable=not progress) as bar:
            for number, block in enumerate(self.windows.blocks(seed, size, limit)):
                kept.add(*self._block(number, block, kept))
                counted += np.bincount(block.tokens.ravel(), minlength=len(counted))
                bar.update(block.n_rows)
                bar.set_postfix(memorized=kept.size("memorized"))
                if n is not None and kept.size("memorized") >= n:
                    break
        return kept, counted

    def _block(self, number: int, block: Block, kept: Kept) -> tuple[SequenceSet, dict[str, int]]:
        # A block that max_rows cut short is not what a longer scan has in its place.
        store = self.store if block.whole else None
        if store is not None and (known := store.load(number, block)) is not None:
            return known
        facts = _facts(self.windows, block)
        found = scan_block(self.model, block, facts, kept, self.rules, self.batch_size)
        if store is not None:
            store.save(number, block, *found)
        return found


def _check_numbers(model: Any, numbers: Mapping[str, int | None], below: float) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} is below 1")
    if not 0 < below <= 1:
        raise OptionError(f"below={below} is not in (0, 1]: 0.5 asks for under half of the tokens")
    length = (numbers["prefix_len"] or 0) + (numbers["suffix_len"] or 0)
    if length > model.cfg.n_ctx:
        raise SequenceError(
            f"a window of {length} tokens is longer than the model's context of {model.cfg.n_ctx}: shorten "
            "prefix_len or suffix_len"
        )


def _check_counts(model: Any, token_counts: Any) -> None:
    if token_counts is not None and np.shape(token_counts) != (model.cfg.d_vocab,):
        raise SequenceError(
            f"token_counts has shape {np.shape(token_counts)}: give one count for each of the "
            f"{model.cfg.d_vocab} ids of the model's vocabulary"
        )


def _batch_size(model: Any, length: int, out: str | Path | None) -> int:
    """Return what fits, or what an interrupted scan began with: memory may have been freer then."""
    begun = None if out is None else ScanStore.begun(out).get("batch_size")
    return begun or rows_per_batch(model.cfg, length, next(model.parameters()).device)


def _windows(model: Any, source: Any, length: int, stride: int | None, tokens_column: str | None) -> Windows:
    if isinstance(source, SequenceSet):
        check_sequences(source, model, n_ctx=source.tokens.shape[1], on_eos="keep")
    return open_windows(source, length, stride, tokens_column)


def _source_name(source: Any) -> str:
    if isinstance(source, str | Path):
        return Path(source).name
    if isinstance(source, SequenceSet) and "source" in source.attrs:
        return str(source.attrs["source"])
    return type(source).__name__


def _about(model: Any, windows: Windows, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a scan another one: all but how far it goes."""
    apart = ("n", "max_rows", "n_threads", "source", "token_counts")
    about = {name: value for name, value in settings.items() if name not in apart}
    return {**about, "weights": model_fingerprint(model), "n_rows": windows.n_rows}


def _facts(windows: Windows, block: Block) -> pd.DataFrame:
    """Return a name for each window, where it stands, and what the source says of its row."""
    if windows.table is None:
        names, facts = [f"row-{row}" for row in block.row.tolist()], pd.DataFrame(index=range(len(block)))
    else:
        facts = windows.table.iloc[block.row].reset_index(drop=True)
        names = facts["id"].tolist()
        facts = facts.drop(columns=[*_OWN, *SCORE_COLUMNS], errors="ignore")
    starts = block.start.tolist()
    ids = [name if start == 0 else f"{name}+{start}" for name, start in zip(names, starts, strict=True)]
    return pd.DataFrame({"id": ids, "row": block.row, "start": block.start}).join(facts)


_VERSION = 2
"""Of the format; version 1 was identified by a sum of weights, which does not see two of them exchanged."""


class ScanStore:
    """The finished blocks of one scan in a folder.

    Args:
        folder: The folder; created if it is missing.
        about: What is scanned, with what and how.

    Raises:
        OtherRunError: The folder belongs to another scan, or another version of memlens wrote it.
        ResultError: Its manifest cannot be read.
    """

    folder: KeyedFolder

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder = KeyedFolder(folder, "scan", about, version=_VERSION, parts="[!.]*")

    @staticmethod
    def begun(folder: str | Path) -> dict[str, Any]:
        """Return what identifies the scan in a folder; nothing if there is none that can be read."""
        try:
            return dict(json.loads((Path(folder) / "manifest.json").read_text())["about"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def load(self, number: int, block: Block) -> tuple[SequenceSet, dict[str, int]] | None:
        """Return what was kept of a block, and its counts; None if it is not finished.

        Raises:
            ResultError: The file is damaged, is not what this scan wrote, or was made from other windows.
        """
        name = _file(number)
        path = self.folder.path / name
        if not path.exists():
            return None
        try:
            found, settings = read_parquet(path)
            scan = settings["scan"]
            seal = scan.pop("seal", None)
        except (FileFormatError, LookupError, OSError, TypeError) as error:
            raise self.folder.damaged(name, error) from error
        self.folder.check(name, _content(found, scan), seal)
        if scan["block"] != block.fingerprint:
            raise ResultError(
                f"{path} was made from other windows than block {number} now has: the source has changed; "
                "give another folder."
            )
        return found, scan["counts"]

    def save(self, number: int, block: Block, found: SequenceSet, counts: Mapping[str, int]) -> None:
        """Write what was kept of a block, whole or not at all."""
        name, scan = _file(number), {"block": block.fingerprint, "counts": dict(counts)}
        seal = self.folder.seal(name, _content(found, scan))
        write_parquet(found, self.folder.path / name, scan={**scan, "seal": seal})


def _file(number: int) -> str:
    return f"block-{number:06d}.parquet"


def _content(found: SequenceSet, scan: Mapping[str, Any]) -> list[Any]:
    return [found, found.table.to_json(orient="split", double_precision=15), json.dumps(scan, sort_keys=True)]


def numerics(model: Any, batch_size: int) -> dict[str, str | int | float | bool]:
    """Return what exact matches may depend on besides the weights: kernels, batches, versions."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    device = next(model.parameters()).device
    attention = getattr(config, "_attn_implementation", None) or "TransformerLens (eager)"
    facts = {
        **describe(model),
        "attention": attention,
        "batch_size": batch_size,
        "torch": torch.__version__,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "n_threads": torch.get_num_threads(),
    }
    return {**facts, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else facts
