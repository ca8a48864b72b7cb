"""Fixtures shared by all tests: no network, few threads, tiny checkpoints made once a session.

What is listed in `WITHOUT_TRANSFORMER_LENS` runs on TransformerLens 3.9 only. The two environments differ in
no other package, so on 4.x these tests would do the same again.
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
from tests.tiny import write_tiny

# The same examples on every run; `pytest --hypothesis-profile=explore` draws new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", max_examples=200)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where models of the tests are loaded, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[VARIABLE] = config.getoption("--device")  # in workers of pytest-xdist, too


TESTS = Path(__file__).parent
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


def _is_without_transformer_lens(path: Path) -> bool:
    if not path.is_relative_to(TESTS) or any(path == TESTS / name for name in BUT):
        return False
    return any(path.is_relative_to(TESTS / name) for name in WITHOUT_TRANSFORMER_LENS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On TransformerLens 4.x and later, run only what can differ there."""
    if int(version("transformer-lens").split(".")[0]) < 4:
        return
    same = [item for item in items if _is_without_transformer_lens(item.path)]
    config.hook.pytest_deselected(items=same)
    items[:] = [item for item in items if not _is_without_transformer_lens(item.path)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Refuse a model that is made or run in a test of the list, or in its fixtures."""
    from transformer_lens.hook_points import HookPoint

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{item.nodeid} uses a model: take its file off the list in tests/conftest.py")

    with pytest.MonkeyPatch.context() as patch:
        if _is_without_transformer_lens(item.path):
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
