"""Fixtures shared by all tests: no network, few threads, tiny checkpoints made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings

from tests.tiny import write_tiny

# The same examples on every run; `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", max_examples=200)
settings.load_profile("same")


@pytest.fixture(scope="session", autouse=True)
def _few_threads_no_bars() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_folder("olmo2")`: the folder of that family's checkpoint, written once a session."""
    written: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in written:
            written[family] = write_tiny(family, tmp_path_factory.mktemp(family))
        return written[family]

    return folder_of


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[..., Any]:
    """`tiny_model("olmo2", "bridge")`: that checkpoint loaded on the CPU, once a session.

    The model is shared: a test that changes weights or config loads its own. A test for a
    HookedTransformer is skipped where the installed TransformerLens has none.
    """
    from memlens.models.load import load_model
    from memlens.models.names import has_hooked_transformer

    loaded: dict[tuple[str, str], Any] = {}

    def model_of(family: str, backend: str = "auto") -> Any:
        if backend == "hooked" and not has_hooked_transformer():
            pytest.skip("this TransformerLens has no HookedTransformer")
        if (family, backend) not in loaded:
            loaded[family, backend] = load_model(tiny_folder(family), backend=backend, device="cpu")
        return loaded[family, backend]

    return model_of
