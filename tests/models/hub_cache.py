"""A hub cache made by hand: tiny checkpoints under real names, in the layout huggingface_hub writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub.file_download import repo_folder_name

from tests.tiny import write_tiny


def put_in_cache(cache: Path, repo: str, family: str, *, revision: str = "main", seed: int = 0) -> Path:
    """Write a tiny checkpoint as `revision` of `repo` and return the snapshot's folder."""
    commit = hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
    home = cache / repo_folder_name(repo_id=repo, repo_type="model")
    snapshot = home / "snapshots" / commit
    write_tiny(family, snapshot, seed=seed)
    ref = home / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)
    return snapshot
