"""The finished blocks of a corpus scan, one file each (see `memlens.store.keyed_folder`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memlens.errors import FileFormatError, ResultError
from memlens.models.provenance import describe
from memlens.recall.corpus.windows import Block
from memlens.sequences.parquet import read_parquet, write_parquet
from memlens.sequences.set import SequenceSet
from memlens.store.keyed_folder import KeyedFolder

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
