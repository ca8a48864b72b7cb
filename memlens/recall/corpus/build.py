"""`build_memorized_set`: scan a corpus for what a model has memorized.

The corpus is read in a seeded random order, one block at a time; one teacher-forced pass decides for each
window whether greedy decoding gives its continuation (see `memlens.recall.score`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from memlens.errors import MemlensError, OptionError, ResultError, SequenceError, check_option
from memlens.files import exact_json, expanded, naming
from memlens.forward.exclusive import computes
from memlens.forward.memory import check_batch_size, rows_per_batch
from memlens.forward.trunk import require_model
from memlens.models.bos import expects_bos
from memlens.models.provenance import describe
from memlens.recall.columns import SCORE_COLUMNS
from memlens.recall.corpus.memorized_set import MemorizedSet, assemble_sets
from memlens.recall.corpus.scan import Kept, PredictableRule, ScanOptions, choose, score_block
from memlens.recall.corpus.windows import Block, Windows, open_windows
from memlens.recall.trivial import TrivialRules
from memlens.sequences.checks import check_sequences
from memlens.sequences.parquet import read_parquet, write_parquet
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import bos_id
from memlens.store.executors import run_parts
from memlens.store.fingerprint import model_fingerprint
from memlens.store.keyed_folder import KeyedFolder, read_manifest
from memlens.store.sharing import Part, check_finished, do_share

_OWN = ("id", "text", "row", "start", "role", "matched_to", "length_difference", "frequency_difference")
"""Columns that the scan itself adds."""


@computes
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
    part: Part | None = None,
    executor: Any = None,
    max_rows: int | None = None,
    keep_trivial: bool = False,
    token_counts: Int[np.ndarray, "vocab"] | None = None,
    stride: int | None = None,
    below: float = 0.5,
    predictable: PredictableRule | None = None,
    rules: TrivialRules | None = None,
    on_eos: Literal["drop", "keep"] = "drop",
    tokens_column: str | None = None,
    prepend_bos: bool | Literal["auto"] = "auto",
    pool_size: int = 20_000,
    block_size: int = 1024,
    progress: bool = True,
) -> MemorizedSet:
    """Scan a corpus for what a model has memorized, and choose controls from the same scan.

    A window consists of its first `prefix_len` tokens, which are given, and the `suffix_len` after them. It
    is memorized if greedy decoding gives all of the latter (discoverable extraction), which one forward pass
    decides. It is kept if its continuation was not kept before and does not follow by rule
    (`trivial_continuations`).

    Controls are matched one to one, from up to `pool_size` candidates each: distinct, not trivial, and none
    with the continuation of a memorized sequence. Predictable windows are not among the unmemorized.

    Args:
        model: A TransformerLens model. Hooks set on it act as in any of its forward passes.
        token_source: Token ids of the model's tokenizer: `[row, token]` or one long `[token]` array (also
            memory-mapped), the path of a `.npy` file of one, a `SequenceSet` (its own prefix lengths are
            ignored), a table or dataset with a column of ids, or any iterable of rows. Iterables without a
            length are shuffled within blocks only; a resumed scan needs the same rows from the start.
        prefix_len: Number of tokens given to the model.
        suffix_len: Number of tokens that must match.
        n: Stop after the block with the n-th memorized sequence; None scans all of the source. Controls are
            found on the way, so there may be too few if nearly everything is memorized.
        seed: Seed of the order of windows, and of ties between controls.
        batch_size: Windows per forward pass; by default as many as the memory budget allows, and unchanged
            when a scan is resumed. Exact matches with a lead of rounding size (`near_tie`) may depend on it.
        out: A folder in which finished blocks are kept, and finally the set. The same call resumes an
            interrupted scan, or extends a finished one if `n` or `max_rows` is larger.
        part: Only score a share of the blocks in `out`, as for `sweep`; the call without `part` chooses among
            what was scored. For sources with a length. Give `max_rows`: all of its blocks are scored.
        executor: Score blocks ahead on the workers of an executor, as for `sweep`, some dozens at a time.
        max_rows: Read at most this many rows (windows, for an array).
        keep_trivial: Keep continuations that follow by rule; the column `trivial` marks them.
        token_counts: How often each id occurs in the training corpus (see `memlens.recall.token_counts`), for
            matching; by default counted in the windows of the scan.
        stride: Tokens from one window of a row to the next. By default only the first window of a row counts,
            as in the published lists; one long text is cut into windows that do not overlap.
        below: Windows with a smaller share of correct tokens (teacher-forced) are unmemorized.
        predictable: Which windows are predictable.
        rules: Which continuations are trivial.
        on_eos: "drop" windows whose continuation contains an end-of-text token, or "keep" them.
        tokens_column: The column of ids of a table or dataset.
        prepend_bos: Put the beginning-of-text token in front of every window that does not begin with it, in
            addition to `prefix_len`. "auto" does so where the model's texts begin with one (see
            `load_sequences`): a window is cut from a text, and such a model knows none without it.
        pool_size: Number of candidates for each set of controls: the first ones of the scan.
        block_size: Rows per block. Blocks are saved one by one; batches never span two blocks.
        progress: Show a progress bar.

    Returns:
        The three sets, counts and settings. The sets' tables have the columns of a `SequenceSet` that was
        scanned, `row` and `start`, the scores of `score_recall`, the shares of `trivial_continuations`, and
        for controls `matched_to` and the differences. If nothing is memorized, all sets are empty, with a
        warning.

    Raises:
        OptionError: A number out of range.
        SequenceError: A window longer than the context, or a source without token ids.
        VocabularyError: An id outside the vocabulary, or a set made with another tokenizer.
        UnfinishedError: With `part`: this share is scored, and other blocks are not.
        WorkerError: With `executor`: as for `sweep`.
        ResultError: `out` contains another scan, or the source has changed since.
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
    options = ScanOptions(
        prefix_len=prefix_len,
        suffix_len=suffix_len,
        n=n,
        seed=seed,
        max_rows=max_rows,
        keep_trivial=keep_trivial,
        stride=stride,
        below=below,
        predictable=predictable or PredictableRule(),
        rules=rules or TrivialRules(),
        on_eos=on_eos,
        pool_size=pool_size,
        block_size=block_size,
        bos=_bos(model, prepend_bos),
    )
    length = prefix_len + suffix_len
    if (whole := length + (options.bos is not None)) > model.cfg.n_ctx:
        raise SequenceError(
            f"a window of {whole} tokens is longer than the model's context of {model.cfg.n_ctx}: shorten "
            "prefix_len or suffix_len"
        )
    if token_counts is not None and np.shape(token_counts) != (model.cfg.d_vocab,):
        raise SequenceError(
            f"token_counts has shape {np.shape(token_counts)}: give one count for each of the "
            f"{model.cfg.d_vocab} ids of the model's vocabulary"
        )
    if isinstance(token_source, SequenceSet):
        check_sequences(token_source, model, n_ctx=token_source.tokens.shape[1], on_eos="keep")
    windows = open_windows(token_source, length, stride, tokens_column)
    size = min(batch_size or _batch_size(model, whole, out), block_size)
    settings = {
        **options.settings(),
        "source": _source_name(token_source),
        "source_kind": windows.kind,
        "token_counts": "counted in the scan" if token_counts is None else "given",
        **_numerics(model, size),
    }
    store = ahead = None
    if out is not None:
        store = _store(out, _about(model, windows, settings))
        reading = (token_source, length, stride, tokens_column)
        ahead = _Scoring(model, windows, options, size, store, settings, reading)
    if part is not None or executor is not None:
        if ahead is None or windows.n_rows is None or (part is not None and executor is not None):
            raise OptionError(
                "part= and executor= need a folder that all workers share (out=) and a source with a length, "
                "and only one of the two can be given."
            )
        if part is not None:
            names = ahead.names()
            do_share(part, names, ahead.folder, ahead.done, ahead.work)
            check_finished(names, ahead.folder, ahead.done)
    with naming(token_source) if isinstance(token_source, str | Path) else nullcontext():
        kept, counted = _scan(model, windows, options, size, store, ahead, executor, progress)
    counts = counted if token_counts is None else np.asarray(token_counts)
    found = assemble_sets(model, kept, counts, settings)
    if out is not None:
        found.save(out)
    return found


def _scan(
    model: Any,
    windows: Windows,
    options: ScanOptions,
    batch_size: int,
    store: KeyedFolder | None,
    ahead: _Scoring | None,
    executor: Any,
    progress: bool,
) -> tuple[Kept, Int[np.ndarray, "vocab"]]:
    """Return what was kept, and how often each id occurred in a window."""
    kept, counted = Kept(), np.zeros(model.cfg.d_vocab, dtype=np.int64)
    known = [value for value in (windows.n_rows, options.max_rows) if value is not None]
    blocks = windows.blocks(options.seed, options.block_size, options.max_rows)
    with tqdm(total=min(known, default=None), desc="scanning", unit="row", disable=not progress) as bar:
        for number, block in enumerate(blocks):
            # A longer scan has another block in place of one that max_rows cut short.
            saved = store if block.whole else None
            found = _load_block(saved, _file(number), block) if saved is not None else None
            if found is None:
                if ahead is not None and executor is not None:
                    ahead.run(executor, number)
                scored = None if ahead is None or saved is None else ahead.load(number, block)
                if scored is None:
                    scored = score_block(model, block, _facts(windows, block), options, batch_size)
                found = choose(model, scored[0], kept, options, scored[1])
                if saved is not None:
                    _save_block(saved, _file(number), block, *found)
            if ahead is not None:
                ahead.remove(number)
            kept.add(*found)
            counted += np.bincount(block.tokens.ravel(), minlength=len(counted))
            bar.update(block.n_rows)
            bar.set_postfix(memorized=kept.size("memorized"))
            if options.n is not None and kept.size("memorized") >= options.n:
                break
    if ahead is not None:
        ahead.remove_all()
    return kept, counted


_AHEAD = 64
"""Blocks that are given to workers at a time."""


class _Scoring:
    """The scores of a scan's blocks as parts, which do not depend on the blocks before them.

    Args:
        model: The model.
        windows: The windows.
        options: The options of the scan.
        batch_size: Windows per forward pass.
        store: The folder of the scan.
        settings: Of the scan.
        reading: The arguments of `open_windows`, for another process.
    """

    folder: Path

    def __init__(
        self,
        model: Any,
        windows: Windows,
        options: ScanOptions,
        batch_size: int,
        store: KeyedFolder,
        settings: Mapping[str, Any],
        reading: tuple[Any, ...],
    ) -> None:
        self.model, self.windows, self.options, self.batch_size = model, windows, options, batch_size
        self.store, self.settings, self.reading, self.folder = store, settings, reading, store.path

    def __reduce__(self) -> Any:
        source, *rest = self.reading
        source = str(expanded(source).absolute()) if isinstance(source, str | Path) else source
        folder = str(self.folder.absolute())
        return _scoring_elsewhere, (
            self.model, self.options, self.batch_size, folder, self.settings, (source, *rest),
        )  # fmt: skip

    def names(self) -> list[str]:
        """Return the names of all whole blocks."""
        size, limit = self.options.block_size, self.options.max_rows
        every = self.windows.n_blocks(size, limit) or 0
        cut = limit is not None and limit < (self.windows.n_rows or 0) and limit % size
        return [_scored(number) for number in range(every - bool(cut))]

    def done(self, part: str) -> bool:
        """Whether a block is scored, or was already chosen from."""
        return (self.folder / part).exists() or (self.folder / _file(int(part[-14:-8]))).exists()

    def work(self, part: str) -> None:
        """Score a block and save it."""
        number = int(part[-14:-8])
        block = self.windows.block(number, self.options.seed, self.options.block_size, self.options.max_rows)
        assert block is not None
        facts = _facts(self.windows, block)
        found = score_block(self.model, block, facts, self.options, self.batch_size)
        _save_block(self.store, part, block, *found)

    def run(self, executor: Any, first: int) -> None:
        """Score the blocks from one on with an executor, unless that one is scored."""
        names = self.names()[first : first + _AHEAD]
        if names and not self.done(names[0]):
            run_parts(executor, self, names)

    def load(self, number: int, block: Block) -> tuple[SequenceSet, dict[str, int]] | None:
        """Return what `score_block` gave elsewhere; None if nothing did."""
        return _load_block(self.store, _scored(number), block)

    def remove(self, number: int) -> None:
        """Remove the scores of a block that was chosen from."""
        (self.folder / _scored(number)).unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Remove the scores of blocks beyond the end of the scan."""
        for path in self.folder.glob("scored-*.parquet"):
            path.unlink(missing_ok=True)


def _scoring_elsewhere(
    model: Any,
    options: ScanOptions,
    batch_size: int,
    folder: str,
    settings: Mapping[str, Any],
    reading: tuple[Any, ...],
) -> _Scoring:
    windows = open_windows(*reading)
    store = _store(folder, _about(model, windows, settings))
    return _Scoring(model, windows, options, batch_size, store, settings, reading)


def _store(folder: str | Path, about: Mapping[str, Any]) -> KeyedFolder:
    return KeyedFolder(folder, "scan", about, version=_VERSION, parts="[!.]*")


def _batch_size(model: Any, length: int, out: str | Path | None) -> int:
    """Return the size that fits, or that of an interrupted scan, which may have had more memory."""
    if out is not None:
        with suppress(MemlensError, KeyError, TypeError):  # opening the folder says what is wrong with it
            return read_manifest(expanded(out) / "manifest.json", "scan", _VERSION)["about"]["batch_size"]
    return rows_per_batch(model.cfg, length, next(model.parameters()).device)


def _source_name(source: Any) -> str:
    if isinstance(source, str | Path):
        return Path(source).name
    if isinstance(source, SequenceSet) and "source" in source.attrs:
        return str(source.attrs["source"])
    return type(source).__name__


def _about(model: Any, windows: Windows, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what identifies a scan: everything but how far it goes."""
    apart = ("n", "max_rows", "n_threads", "source", "token_counts")
    about = {name: value for name, value in settings.items() if name not in apart}
    return {**about, "weights": model_fingerprint(model), "n_rows": windows.n_rows}


def _facts(windows: Windows, block: Block) -> pd.DataFrame:
    """Return a name for each window, its place, and the source's facts about its row."""
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
"""Of the format; version 1 used a sum of weights, which stays the same if two weights are exchanged."""


def _load_block(store: KeyedFolder, name: str, block: Block) -> tuple[SequenceSet, dict[str, int]] | None:
    """Return what a scan kept of a block (or its scores), and its counts; None if it is not finished.

    Raises:
        ResultError: The file is damaged, was not written by this scan, or was made from other windows.
    """
    path = store.path / name
    if not path.exists():
        return None
    with store.parsing(name):
        found, settings = read_parquet(path)
        scan = {**settings["scan"]}
        seal = scan.pop("seal", None)
        store.check(name, _content(found, scan), seal)
    if scan["block"] != block.fingerprint:
        raise ResultError(
            f"{path} was made from other windows than this block now has: the source has changed; "
            "give another folder."
        )
    return found, scan["counts"]


def _save_block(
    store: KeyedFolder, name: str, block: Block, found: SequenceSet, counts: Mapping[str, int]
) -> None:
    scan = {"block": block.fingerprint, "counts": dict(counts)}
    seal = store.seal(name, _content(found, scan))
    write_parquet(found, store.path / name, scan={**scan, "seal": seal})


def _file(number: int) -> str:
    return f"block-{number:06d}.parquet"


def _scored(number: int) -> str:
    return f"scored-{number:06d}.parquet"


def _content(found: SequenceSet, scan: Mapping[str, Any]) -> list[Any]:
    return [found, found.table.to_json(orient="split", double_precision=15), exact_json(scan, sort_keys=True)]


def _numerics(model: Any, batch_size: int) -> dict[str, str | int | float | bool]:
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


def _bos(model: Any, prepend: bool | Literal["auto"]) -> int | None:
    """Return the token that windows begin with; None: none is put there.

    Raises:
        OptionError: Another word than "auto".
        SequenceError: The tokenizer has no such token.
    """
    if isinstance(prepend, str):
        check_option("prepend_bos", prepend, ["auto"])
    tokenizer = getattr(model, "tokenizer", None)
    wanted = expects_bos(model, tokenizer) if prepend == "auto" else prepend
    return bos_id(tokenizer) if wanted else None
