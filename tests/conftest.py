"""Fixtures shared by all tests: no network, few threads, tiny checkpoints made once a session.

Which of them run on TransformerLens 4.x is in `tests/releases.py`.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import pickle
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from filelock import FileLock
from hypothesis import settings

from tests.devices import VARIABLE, dev
from tests.releases import runs_on_4, touches_no_model
from tests.tiny import write_tiny

# The same examples on every run; `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", max_examples=200)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models of the tests are loaded, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[VARIABLE] = config.getoption("--device")  # in workers of pytest-xdist, too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On TransformerLens 4.x and later, run only what can differ there."""
    if int(version("transformer-lens").split(".")[0]) < 4:
        return
    runs = [runs_on_4(item.path, getattr(item, "originalname", item.name)) for item in items]
    config.hook.pytest_deselected(items=[item for item, run in zip(items, runs, strict=True) if not run])
    items[:] = [item for item, run in zip(items, runs, strict=True) if run]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Refuse a model that is made or run in a test of the list, or in its fixtures."""
    from transformer_lens.hook_points import HookPoint

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{item.nodeid} uses a model: take its file off the list in tests/releases.py")

    with pytest.MonkeyPatch.context() as patch:
        if touches_no_model(item.path):
            patch.setattr(HookPoint, "__init__", refuse)
            patch.setattr(HookPoint, "forward", refuse)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _few_threads_no_bars() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`made_once("name", make)`: what `make(folder)` returns, called by one worker of pytest-xdist only.

    The others wait, and read its return value; what it writes into its folder, all of them find there.
    """
    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root

    def get(name: str, make: Callable[[Path], Any]) -> Any:
        folder = root / "made_once" / name
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder.with_suffix(".pickle")
        with FileLock(folder.with_suffix(".lock")):
            if not kept.exists():
                kept.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(kept.read_bytes())

    return get


@pytest.fixture(scope="session")
def shipped_corpus(made_once: Callable[..., Any]) -> Any:
    """The corpus of `zoo/pythia-s`, which takes long to make."""
    from memlens.organisms.training.zoo import zoo_corpus

    return made_once("corpus", lambda _: zoo_corpus("pythia-s"))


@pytest.fixture(scope="session")
def corpora_kept() -> Generator[None, None, None]:
    """Let training take a corpus that was made before in this session: its specification decides it."""
    from memlens.organisms.training import zoo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "build_corpus", functools.cache(zoo.build_corpus))
        yield


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
            loaded[family, backend] = load_model(tiny_folder(family), backend=backend, device=dev())
        return loaded[family, backend]

    return model_of
