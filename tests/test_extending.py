"""Another package adds metrics, families, instruments, figures, readers and studies: the example does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "plugin" / "memlens-example"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example package was installed by pip, without a network."""
    source = tmp_path_factory.mktemp("source") / EXAMPLE.name
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, timeout=300)
    return target


def _run(command: list[str], installed: Path, cwd: Path) -> str:
    """Run Python in a new process that sees memlens and the installed example; return what it printed."""
    path = os.pathsep.join([str(ROOT), str(installed)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=env, cwd=cwd
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be imported" not in done.stderr
    return done.stdout


def test_a_metric_is_known_by_its_name(installed: Path, tmp_path: Path) -> None:
    code = """
import torch, memlens as ml
metric = ml.METRICS["top10"]
ids = torch.tensor([[3, 19]])
logits = torch.arange(20.0).expand(1, 2, 20)  # 3 is not among the ten largest, 19 is
print(float(metric(logits, ids, torch.ones(1, 2, dtype=torch.bool))), metric.better)
"""
    assert _run(["-c", code], installed, tmp_path) == "0.5 higher\n"


def test_an_instrument_gives_a_kind_with_figure_and_reading(installed: Path, tmp_path: Path) -> None:
    code = """
import memlens as ml
from memlens.results.kinds import reading
model = ml.load_model("zoo/pythia-xs")
seqs = ml.load_sequences("zoo", model)
from memlens_example.instrument import scale_mlps
scale_mlps(model, seqs[-2:], factor=0.0, progress=False).save("scaled.nc")
ablated = ml.ablate_mlps(model, seqs[-2:], progress=False)  # a factor of 0 is an ablation
scaled = ml.load_result("scaled.nc")
print(scaled.kind, float(abs(scaled["target_logprob"] - ablated["target_logprob"]).max()) < 1e-5)
"""
    assert _run(["-c", code], installed, tmp_path) == "mlp_scaling True\n"
    code = """
import memlens as ml
from memlens.results.kinds import reading
scaled = ml.load_result("scaled.nc")  # nothing of the plugin was imported: its kind is found by name
bars = scaled.plot("top10").data[0]
effect = scaled.effect("top10").mean("sequence").values
print(type(bars).__name__, len(bars.y) == len(effect), bool(abs(bars.y - effect).max() < 1e-6))
print(scaled.plot("top10").layout.yaxis.title.text)
print(reading(scaled))
"""
    lines = _run(["-c", code], installed, tmp_path).splitlines()
    assert lines[0] == "Bar True True"
    assert lines[1] == "targets in the top 10 (share of tokens)"
    assert "layer" in lines[2]


def test_a_family_is_in_the_table(installed: Path, tmp_path: Path) -> None:
    code = """
import memlens as ml
table = ml.families_table().set_index("model")
print(table.loc["Qwen/Qwen2-0.5B", "family"], table.loc["Qwen/Qwen2-0.5B", "license"])
"""
    assert _run(["-c", code], installed, tmp_path) == "qwen2 Apache-2.0\n"


def test_a_reader_opens_its_files(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.pairs").write_text("the miller of Tarn => sold a net\nthe baker => sold a spoon\n")
    code = """
import memlens as ml
seqs = ml.load_sequences("mine.pairs", ml.load_model("zoo/pythia-xs"))
print(len(seqs), seqs.texts[0])
"""
    assert _run(["-c", code], installed, tmp_path) == "2 the miller of Tarn sold a net\n"


def test_a_study_has_a_command(installed: Path, tmp_path: Path) -> None:
    shown = _run(["-m", "memlens", "run", "--help"], installed, tmp_path)
    assert "scaling" in shown
    assert "How much of its MLPs does a model need to recite?" in shown
    assert "--factor" in _run(["-m", "memlens", "run", "scaling", "--help"], installed, tmp_path)
    command = ["run", "scaling", "--model", "zoo/pythia-s", "--sequences", "zoo", "--factor", "0.25"]
    command += ["--max-sequences", "3", "--out", "out"]
    _run(["-m", "memlens", *command], installed, tmp_path)
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "scaling.nc").is_file()
