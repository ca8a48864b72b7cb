"""The files of a corpus scan: a manifest of what is scanned, and one file for each finished block.

A file is written whole or not at all, and only after its block is done, so a scan that was stopped at any
moment goes on behind its last finished block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlens.errors import FileFormatError, ResultError
from memlens.files import write_atomically
from memlens.models.provenance import describe
from memlens.recall.corpus.windows import Block
from memlens.sequences.parquet import read_parquet, write_parquet
from memlens.sequences.set import SequenceSet

_FORMAT = "memlens scan 1"


class ScanStore:
    """The finished blocks of one scan in a folder.

    Args:
        folder: Where they are; made where it is missing.
        about: What is scanned, with what and how, part by part.

    Raises:
        ResultError: The folder holds another scan, or a manifest that cannot be read.
    """

    folder: Path
    manifest: Path
    key: str

    def __init__(self, folder: str | Path, about: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / "manifest.json"
        content = json.dumps({"format": _FORMAT, "about": about}, indent=1, sort_keys=True)
        self.key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        if self.manifest.exists():
            self._compare(json.loads(content)["about"])
        elif self.folder.is_dir() and any(self.folder.glob("[!.]*")):
            raise ResultError(f"{self.folder} is not empty and holds no scan: give a new folder")
        else:
            write_atomically(self.manifest, content.encode())

    @staticmethod
    def begun(folder: str | Path) -> dict[str, Any]:
        """Return what the scan in a folder is about; nothing where there is none that can be read."""
        try:
            return dict(json.loads((Path(folder) / "manifest.json").read_text())["about"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _compare(self, about: Mapping[str, Any]) -> None:
        try:
            found = json.loads(self.manifest.read_text())
            then, known = found["about"], found["format"] == _FORMAT
            other = sorted(name for name in {*about, *then} if then.get(name) != about.get(name))
        except (ValueError, KeyError, TypeError) as error:
            raise ResultError(
                f"{self.manifest} is damaged or no manifest of a scan ({error}): give another folder"
            ) from error
        if other or not known:
            raise ResultError(
                f"{self.manifest} is of another scan ({', '.join(other) or 'the format'} differ): give "
                "another folder, or delete this one"
            )

    def load(self, number: int, block: Block) -> tuple[SequenceSet, dict[str, int]] | None:
        """Return what was kept of a block, and its counts; None where it is not finished.

        Raises:
            ResultError: The file is damaged or of another scan, or the source gives other windows than then.
        """
        path = self._path(number)
        if not path.exists():
            return None
        try:
            found, settings = read_parquet(path)
            scan = settings["scan"]
        except (FileFormatError, LookupError, OSError) as error:
            raise ResultError(f"{path} is damaged ({error}): delete it and run again") from error
        if scan["key"] != self.key:
            raise ResultError(f"{path} is of another scan than {self.manifest}: delete it and run again")
        if scan["block"] != block.fingerprint:
            raise ResultError(
                f"{path} was made of other windows than block {number} now has: the source has changed, so "
                "give another folder"
            )
        return found, scan["counts"]

    def save(self, number: int, block: Block, found: SequenceSet, counts: Mapping[str, int]) -> None:
        """Write what was kept of a block, whole or not at all."""
        scan = {"key": self.key, "block": block.fingerprint, "counts": dict(counts)}
        write_parquet(found, self._path(number), scan=scan)

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.parquet"


@torch.no_grad()
def model_name(model: nn.Module) -> str:
    """Return a name of the model's weights and the hooks that stand on it.

    The sum of each tensor's bits, read as whole numbers: any change of a single number changes it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        total = int(tensor.detach().contiguous().reshape(-1).view(whole).sum(dtype=torch.int64))
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape), total)).encode())
    points: Mapping[str, Any] = getattr(model, "hook_dict", {})
    digest.update(repr(sorted(name for name, point in points.items() if point.fwd_hooks)).encode())
    return digest.hexdigest()


def numerics(model: Any, batch_size: int) -> dict[str, str | int | float | bool]:
    """Return what exact matches may hang on beside the weights: kernels, batches, versions."""
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
