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
EXAMPLE = ROOT / "examples" / "memlens-example"

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


def _call(command: list[str], cwd: Path, *packages: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process that sees memlens and the packages in some folders."""
    path = os.pathsep.join(map(str, [ROOT, *packages]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=600, env=env, cwd=cwd
    )


def _run(command: list[str], installed: Path, cwd: Path) -> str:
    """Run Python in a new process that sees memlens and the installed example; return what it printed."""
    done = _call(command, cwd, installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cannot be imported" not in done.stderr
    return done.stdout


BY_NAME = """
import json
import torch, memlens as ml
metric = ml.METRICS["top10"]
logits = torch.arange(20.0).expand(1, 2, 20)  # 3 is not among the ten largest, 19 is
value = float(metric(logits, torch.tensor([[3, 19]]), torch.ones(1, 2, dtype=torch.bool)))
qwen = ml.families_table().set_index("model").loc["Qwen/Qwen2-0.5B"]
model = ml.load_model("zoo/pythia-xs")
read = ml.load_sequences("mine.pairs", model)
seqs = ml.load_sequences("zoo", model)
size = ml.benchmark.LOCALIZERS["size of addition"]
scores = size(model, seqs[:2], component="layer_mlp", others=seqs[2:6])
print(json.dumps({
    "metric": [value, metric.better],
    "family": [qwen["family"], qwen["license"]],
    "read": [len(read), read.texts[0]],
    "instrument": ml.instruments.INSTRUMENTS["scaled MLPs"].kind,
    "set": ml.sequences.named_sets().set_index("name").loc["example:proverbs", "license"],
    "localizer": [*scores.shape, bool((scores > 0).all())],
}))
# Until here only by name.
from memlens_example.instrument import scale_mlps
scale_mlps(model, seqs[-2:], factor=0.0, progress=False).save("scaled.nc")
ablated = ml.ablate_mlps(model, seqs[-2:], progress=False)  # a factor of 0 is an ablation
scaled = ml.load_result("scaled.nc")
print(scaled.kind, float(abs(scaled["target_logprob"] - ablated["target_logprob"]).max()) < 1e-5)
"""
WITH_A_SAVED_RESULT = """
import memlens as ml
from memlens.report.bibliography import citations_of
from memlens.results.kinds import reading
scaled = ml.load_result("scaled.nc")  # nothing of the plugin was imported: its kind is found by name
bars = scaled.plot("top10").data[0]
effect = scaled.effect("top10").mean("sequence").values
print([c.key for c in citations_of(scaled) if c.what == "scaling the MLPs"])
print(type(bars).__name__, len(bars.y) == len(effect), bool(abs(bars.y - effect).max() < 1e-6))
print(scaled.plot("top10").layout.yaxis.title.text)
print(reading(scaled))
"""
COMMANDS = """
import sys
from memlens import cli
for args in [line.split() for line in sys.argv[1:]]:
    sys.argv = ["memlens", *args]
    try:
        cli.main()
    except SystemExit as stop:
        print("exit code", stop.code)
"""
HELPS = ("--help", "plugins", "run --help", "run scaling --help", "benchmark localizers")


def test_names_are_known_and_an_instrument_gives_a_kind_with_figure_and_reading(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.pairs").write_text("the miller of Tarn => sold a net\nthe baker => sold a spoon\n")
    names, instrument = _run(["-c", BY_NAME], installed, tmp_path).splitlines()
    assert json.loads(names) == {
        "metric": [0.5, "higher"],
        "family": ["qwen2", "Apache-2.0"],
        "read": [2, "the miller of Tarn sold a net"],
        "instrument": "mlp_scaling",
        "set": "CC0-1.0",
        "localizer": [2, 4, 1, True],
    }
    assert instrument == "mlp_scaling True"
    lines = _run(["-c", f"{WITH_A_SAVED_RESULT}{COMMANDS}", *HELPS], installed, tmp_path).splitlines()
    assert lines[0] == "['example2026']"
    assert lines[1] == "Bar True True"
    assert lines[2] == "targets in the top 10 (share of tokens)"
    assert "layer" in lines[3]
    whole, study = "\n".join(lines).split("Usage: memlens run COMMAND")
    assert "Extended by memlens-example 0.1.0" in whole
    assert "memlens_example.scaling.command" in whole
    assert "localizer size of addition" in whole
    assert "nothing" not in whole.split("Plugins")[1]
    assert "How much of its MLPs does a model need to recite?" in study.split("Usage: ")[0]
    assert "--factor" in study
    assert "size of addition" in study
    assert "exit code" not in study


def test_a_study_runs_by_its_command(installed: Path, tmp_path: Path) -> None:
    command = ["run", "scaling", "--model", "zoo/pythia-xs", "--sequences", "zoo", "--factor", "0.25"]
    command += ["--max-sequences", "3"]
    done = _call(["-m", "memlens", *command, "--out", "out"], tmp_path, installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    assert (tmp_path / "out" / "scaling.nc").is_file()
    (finding,) = json.loads((tmp_path / "out" / "run.json").read_text())["findings"]
    assert finding["low"] <= finding["estimate"] <= finding["high"] < 0
    planned = _run(["-m", "memlens", *command, "--plan", "--json"], installed, tmp_path)
    assert "scaling" in {step["step"] for step in json.loads(planned)["steps"]}


def test_the_tests_of_the_example_pass(installed: Path, tmp_path: Path) -> None:
    tests = shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    passed = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    assert "1 passed" in _run([*passed, str(tests)], installed, tmp_path)


REFERENCES = "from memlens.report.bibliography import Reference, register_reference"
BROKEN = {
    "cannot_be_imported": "import no_such_package",
    "leaves": "raise SystemExit('this plugin leaves')",
    "takes_a_name": (
        "from memlens.forward.metrics import METRICS\nMETRICS.add('exact_match', METRICS['margin'])"
    ),
    "fails_on_sources": (
        "from memlens.sequences.readers.registry import register_source\n"
        "register_source('own', lambda source: source['own'])(lambda source, request: source)"
    ),
    "is_no_study": "from memlens.studies.registry import STUDIES; STUDIES.add('nothing', 'not a study')",
    "has_an_option_of_every_study": (
        "from memlens.options import options_class\n"
        "from memlens.studies.registry import STUDIES, Study\n"
        "@options_class\n"
        "class Options:\n"
        "    out: int = 1\n"
        "STUDIES.add('clash', Study(run=print, options=Options, help='What?'))"
    ),
    "shares_a_name_1": f"{REFERENCES}; register_reference('k', Reference('A', 1, 'T'))",
    "shares_a_name_2": f"{REFERENCES}; register_reference('k', Reference('B', 2, 'U'))",
    "adds_nothing": "import memlens",
}


def test_broken_plugins_are_named_and_stop_nothing(tmp_path: Path) -> None:
    """One module for each way to fail, in a package that was installed by hand."""
    about = tmp_path / "packages" / "broken-1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    entries = "".join(f"{name} = broken_{name}\n" for name in BROKEN)
    (about / "entry_points.txt").write_text(f"[memlens.plugins]\n{entries}names_no_module = not a module\n")
    for name, code in BROKEN.items():
        (about.parent / f"broken_{name}.py").write_text(code)
    read = "import memlens as ml; print(len(ml.load_sequences([[1, 2, 3]], prefix_len=1)))"
    code = f"{COMMANDS}\n{read}"
    done = _call(["-c", code, "plugins --json", "run --help"], tmp_path, about.parent)
    assert done.returncode == 0, done.stderr
    listed, _, rest = done.stdout.partition("exit code 1\n")
    plugins = json.loads(listed)
    errors = {plugin["name"]: plugin["error"] for plugin in plugins}
    adds = {plugin["name"]: plugin["adds"] for plugin in plugins}
    assert errors["cannot_be_imported"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert errors["leaves"] == "SystemExit: this plugin leaves"
    assert "'exact_match' is registered already by memlens: choose another name" in errors["takes_a_name"]
    assert "'k' is registered already by broken_shares_a_name_1" in errors["shares_a_name_2"]
    assert errors["names_no_module"] == "OptionError: 'not a module' is not the name of a module"
    assert "study 'nothing' is 'not a study': register an object of the class Study" in errors["is_no_study"]
    assert (
        errors["fails_on_sources"] == errors["has_an_option_of_every_study"] == errors["adds_nothing"] == ""
    )
    assert adds["fails_on_sources"] == ["source own"]
    assert adds["shares_a_name_1"] == ["reference k"]
    assert adds["adds_nothing"] == []
    assert "localize" in rest
    assert rest.endswith("\n1\n")
    for said in (
        "the plugin leaves (broken_leaves, of broken 1.2) cannot be imported",
        "the study clash has no command: ValueError: duplicate parameter name: 'out'",
        "the source 'own' cannot say what it reads",
    ):
        assert said in done.stderr
