"""`score_to_file`: the scores of a source larger than memory, written some sequences at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from memlens.errors import EmptySetError, ResultError, check_option
from memlens.files import expanded
from memlens.recall.score import score_recall
from memlens.sequences.parquet import join_parquet, read_settings, write_parquet
from memlens.sequences.readers.portions import sequence_portions
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.store.keyed_folder import KeyedFolder

_VERSION = 1


def score_to_file(
    model: Any,
    source: Any,
    out: str | Path,
    *,
    size: int = 4096,
    reading: Mapping[str, Any] | None = None,
    progress: bool = True,
    **scoring: Any,
) -> Path:
    """Score the sequences of a source and write them to a parquet file, a portion at a time.

    Memory holds one portion of sequences with its scores, however many there are. Finished portions are kept
    in the folder `<out>.parts` until the file is complete: the same call continues an interrupted one. Each
    portion is scored by `score_recall`, so that the numbers are those of a single call but for rounding.

    Args:
        model: A TransformerLens model.
        source: As of `load_sequences`, or an iterable of `SequenceSet`; see `sequence_portions` for what is
            read without being held in memory.
        out: The file, `.parquet`; `RecallScores.load` reads it.
        size: Rows of the source per portion, and rows per row group of the file.
        reading: Options of `load_sequences`.
        progress: Show a progress bar.
        scoring: Options of `score_recall`.

    Returns:
        The path of the file.

    Raises:
        OptionError: `out` does not end in .parquet.
        EmptySetError: The source has no sequences.
        OtherRunError: The parts are those of another model, source or options.
        ResultError: The source has changed since the parts were written.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:6]
        >>> path = score_to_file(model, seqs, f"{tempfile.mkdtemp()}/all.parquet", size=4, progress=False)
        >>> len(ml.recall.RecallScores.load(path))
        6
    """
    path, reading = expanded(out), dict(reading or {})
    check_option("the suffix of out", path.suffix.lower(), [".parquet"])
    about = {
        "the model": model_fingerprint(model),
        "the options of scoring": fingerprint(scoring),
        "the options of reading": fingerprint(
            {name: reading[name] for name in reading if name != "tokenizer"}
        ),
        "the size of portions": size,
    }
    folder = path.with_name(f"{path.name}.parts")
    store = KeyedFolder(folder, "scoring", about, version=_VERSION, parts="*.parquet")
    parts: list[Path] = []
    with tqdm(desc="scoring", unit="sequence", disable=not progress) as bar:
        for number, seqs in enumerate(_portions(source, model, size, reading)):
            part = folder / f"portion-{number:06d}.parquet"
            content = fingerprint([seqs.tokens, seqs.mask, seqs.prefix_len, seqs.ids])
            if not part.exists():
                scores = score_recall(model, seqs, progress=False, **scoring)
                whole = seqs.with_table(scores.table)
                write_parquet(
                    whole, part, recall=dict(scores.attrs), portion={"of": store.key, "content": content}
                )
            elif _portion(store, part) != {"of": store.key, "content": content}:
                raise ResultError(
                    f"{part} was made from other sequences than the source now has: delete {folder} and "
                    "score again"
                )
            parts.append(part)
            bar.update(len(seqs))
    if not parts:
        raise EmptySetError("the source has no sequences to score")
    join_parquet(parts, path)
    shutil.rmtree(folder)
    return path


def _portions(source: Any, model: Any, size: int, reading: Mapping[str, Any]) -> Iterable[SequenceSet]:
    if isinstance(source, SequenceSet) and not reading:
        return (source[start : start + size] for start in range(0, len(source), size))
    return sequence_portions(source, model, size, **reading)


def _portion(store: KeyedFolder, part: Path) -> Any:
    with store.parsing(part.name):
        return read_settings(part)["portion"]
