"""Another package adds what memlens knows by name, from metrics to studies: the example does."""

from __future__ import annotations

import json
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


IN_ONE_PROCESS = """
import json
import torch, memlens as ml
metric = ml.METRICS["top10"]
logits = torch.arange(20.0).expand(1, 2, 20)  # 3 is not among the ten largest, 19 is
value = float(metric(logits, torch.tensor([[3, 19]]), torch.ones(1, 2, dtype=torch.bool)))
qwen = ml.families_table().set_index("model").loc["Qwen/Qwen2-0.5B"]
model = ml.load_model("zoo/pythia-xs")
read = ml.load_sequences("mine.pairs", model)
print(json.dumps({
    "metric": [value, metric.better],
    "family": [qwen["family"], qwen["license"]],
    "read": [len(read), read.texts[0]],
}))
# Until here only by name.
seqs = ml.load_sequences("zoo", model)
from memlens_example.instrument import scale_mlps
scale_mlps(model, seqs[-2:], factor=0.0, progress=False).save("scaled.nc")
ablated = ml.ablate_mlps(model, seqs[-2:], progress=False)  # a factor of 0 is an ablation
scaled = ml.load_result("scaled.nc")
print(scaled.kind, float(abs(scaled["target_logprob"] - ablated["target_logprob"]).max()) < 1e-5)
"""
WITH_A_SAVED_RESULT = """
import memlens as ml
from memlens.results.kinds import reading
scaled = ml.load_result("scaled.nc")  # nothing of the plugin was imported: its kind is found by name
bars = scaled.plot("top10").data[0]
effect = scaled.effect("top10").mean("sequence").values
print(type(bars).__name__, len(bars.y) == len(effect), bool(abs(bars.y - effect).max() < 1e-6))
print(scaled.plot("top10").layout.yaxis.title.text)
print(reading(scaled))
"""
A_LOCALIZER = """
import memlens as ml
model = ml.load_model("zoo/pythia-xs")
seqs = ml.load_sequences("zoo", model)[:6]
scores = ml.benchmark.LOCALIZERS["size of addition"](model, seqs[:2], component="layer_mlp", others=seqs[2:])
print(scores.shape, bool((scores > 0).all()))
"""
HELP = """
import sys
from memlens import cli
for args in (["run", "--help"], ["run", "scaling", "--help"]):
    sys.argv = ["memlens", *args]
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code
"""


def test_names_are_known_and_an_instrument_gives_a_kind_with_figure_and_reading(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.pairs").write_text("the miller of Tarn => sold a net\nthe baker => sold a spoon\n")
    names, instrument = _run(["-c", IN_ONE_PROCESS], installed, tmp_path).splitlines()
    found = json.loads(names)
    assert found["metric"] == [0.5, "higher"]
    assert found["family"] == ["qwen2", "Apache-2.0"]
    assert found["read"] == [2, "the miller of Tarn sold a net"]
    assert instrument == "mlp_scaling True"
    lines = _run(["-c", WITH_A_SAVED_RESULT], installed, tmp_path).splitlines()
    assert lines[0] == "Bar True True"
    assert lines[1] == "targets in the top 10 (share of tokens)"
    assert "layer" in lines[2]


def test_a_localizer_is_listed_and_ranks(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(_run(["-m", "memlens", "benchmark", "localizers", "--json"], installed, tmp_path))
    (own,) = (row for row in listed if row["localizer"] == "size of addition")
    assert own["components"] == "layer_mlp, layer_attention"
    scored = _run(["-c", A_LOCALIZER], installed, tmp_path).split()
    assert scored == ["(2,", "4,", "1)", "True"]


def test_a_study_has_a_command(installed: Path, tmp_path: Path) -> None:
    shown = _run(["-c", HELP], installed, tmp_path)
    assert "scaling" in shown
    assert "How much of its MLPs does a model need to recite?" in shown
    assert "--factor" in shown
    command = ["run", "scaling", "--model", "zoo/pythia-xs", "--sequences", "zoo", "--factor", "0.25"]
    command += ["--max-sequences", "3", "--out", "out"]
    _run(["-m", "memlens", *command], installed, tmp_path)
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "scaling.nc").is_file()
