"""Persisted sweeps: whatever ends a run, the next one does what is missing and nothing else."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import InterventionError, ResultError, WriteError
from memlens.sweeps import shards as shards_module
from memlens.sweeps.shards import Parts, Shard, ShardStore, cut, part_limit
from tests.kill_loops import Job, kill_loop
from tests.small import corrupted, ragged

METRICS = ("target_logprob", "target_rank", "exact_match")


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part holds one batch and the fewest interventions."""
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})


def patches(model: Any, **options: Any) -> list[ml.Intervention]:
    return ml.edits.activation_patches(model, corrupted(ragged()), **options)


def run(model: Any, out: Path | None, edits: Any = None, **options: Any) -> ml.Result:
    options = {"batch_size": 2, "progress": False, **options}
    return ml.sweep(model, ragged(), edits or patches(model), METRICS, out=out, **options)


def same(a: ml.Result, b: ml.Result) -> bool:
    return a.data.drop_attrs().identical(b.data.drop_attrs())


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.usefixtures("many_parts")
def test_parts_together_are_the_whole(tiny_model: Any, tmp_path: Path, per_token: bool) -> None:
    model = tiny_model("gpt_neox", "bridge")
    kept = run(model, tmp_path / "s", per_token=per_token)
    whole = run(model, None, per_token=per_token)
    assert len(list((tmp_path / "s").glob("*.npz"))) == 2 * 4  # 4 sequences by 2, 57 interventions by 16
    for name in whole.data.data_vars:
        assert np.allclose(kept[str(name)], whole[str(name)], atol=1e-5, equal_nan=True)
    assert same(ml.load_result(tmp_path / "s" / "result.nc"), kept)


@pytest.mark.usefixtures("many_parts")
def test_a_rerun_does_only_what_is_missing(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    first = run(model, tmp_path)
    files = sorted(tmp_path.glob("*.npz"))
    files[1].unlink()
    files[4].unlink()
    ran: list[tuple[range, int]] = []
    module = sys.modules["memlens.sweeps.run"]
    plain = module.run_batches

    def counted(*args: Any) -> Any:
        ran.append((args[-1], len(args[2])))
        return plain(*args)

    monkeypatch.setattr(module, "run_batches", counted)
    assert same(run(model, tmp_path), first)
    assert ran == [(range(2), 16), (range(2, 4), 16)]
    assert same(run(model, tmp_path, memory_budget=300_000, batch_size=1), first)
    assert len(ran) == 2


@pytest.mark.usefixtures("many_parts")
def test_a_raising_hook_keeps_what_was_done(tiny_model: Any, tmp_path: Path) -> None:
    model, edits = tiny_model("llama", "bridge"), patches(tiny_model("llama", "bridge"))

    class Fails:
        now = True

        def __getstate__(self) -> None:
            return None  # whether it fails is no part of what it computes

        def __call__(self, x: torch.Tensor, hook: Any) -> torch.Tensor:
            if self.now:
                raise OSError("no such file")
            return x * 2

    fails = Fails()
    edits[40] = ml.Intervention("fails", [("blocks.1.hook_mlp_out", fails)], edits[40].coords)
    with pytest.raises(InterventionError, match=r"'blocks.1.hook_mlp_out' of intervention 'fails'.*no such"):
        run(model, tmp_path, edits)
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    fails.now = False
    kept = run(model, tmp_path, edits)
    assert np.allclose(kept["target_logprob"], run(model, None, edits)["target_logprob"], atol=1e-5)


def test_a_finished_run_in_a_read_only_folder_is_read(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", "bridge")
    edits = patches(model)[:4]
    made = run(model, tmp_path, edits)

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert run(model, tmp_path, edits).data.equals(made.data)
    (tmp_path / "result.nc").unlink()
    with pytest.raises(WriteError, match=r"result\.nc cannot be written \(Read-only file system\)"):
        run(model, tmp_path, edits)


@pytest.mark.parametrize("what", ["the model", "the sequences", "the interventions", "the metrics"])
def test_another_sweep_is_refused_by_name(tiny_folder: Any, tmp_path: Path, what: str) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), backend="bridge")
    factor = 0.5
    edit = [ml.Intervention("a", [("blocks.1.hook_mlp_out", lambda x, hook: x * factor)])]
    seqs, metrics = ragged(), METRICS
    ml.sweep(model, seqs, edit, metrics, out=tmp_path, progress=False)
    if what == "the model":
        with torch.no_grad():
            next(model.parameters()).view(-1)[7] += 1e-3
    elif what == "the sequences":
        seqs = ragged(seed=5)
    elif what == "the interventions":
        factor = 0.25  # in the closure
    else:
        metrics = METRICS[:1]
    told = "; metrics was \\['.*'\\] and is \\['.*'\\]" if what == "the metrics" else ""
    with pytest.raises(ResultError, match=rf"belongs to another sweep \(different: {what}{told}\)"):
        ml.sweep(model, seqs, edit, metrics, out=tmp_path, progress=False)


def test_foreign_and_damaged_files_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox", "bridge")
    run(model, tmp_path / "a")
    run(model, tmp_path / "b", patches(model, layers=[1]))
    ours, other = (next(iter((tmp_path / n).glob("*.npz"))) for n in "ab")
    content = ours.read_bytes()
    ours.write_bytes(other.read_bytes())
    with pytest.raises(ResultError, match=rf"{ours.name} does not belong to .*manifest"):
        run(model, tmp_path / "a")
    ours.write_bytes(content[: len(content) // 2])
    with pytest.raises(ResultError, match=rf"{ours.name} is damaged"):
        run(model, tmp_path / "a")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    ours.write_bytes(bytes(flipped))
    with pytest.raises(ResultError, match=rf"{ours.name}"):
        run(model, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text('{"format"')
    with pytest.raises(ResultError, match=r"manifest.json is damaged"):
        run(model, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(ResultError, match=r"holds no manifest\.json of a sweep"):
        run(model, tmp_path / "a")


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_repeat_nothing(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` again and again; finished parts are never written twice, the result is that of one run."""
    monkeypatch.setattr(sys.modules["memlens.sweeps.shards"], "_SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})
    model, written = tiny_model("gpt_neox", "bridge"), dict[Path, dict[str, int]]()
    edits = ml.edits.activation_patches(model, corrupted(ragged()), site="z", over="head_position")

    def work(folder: Path) -> None:
        ml.sweep(model, ragged(), edits, batch_size=1, out=folder, progress=False)

    def check(folder: Path) -> None:
        now = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
        before = written.get(folder, {})
        assert {name: now[name] for name in before} == before
        written[folder] = now

    assert kill_loop(Job("a sweep of many parts", work, check=check), 5, tmp_path).kills == 5
    assert max(len(parts) for parts in written.values()) > 8


def test_a_file_that_was_being_written_is_no_part(tiny_model: Any, tmp_path: Path) -> None:
    """What a kill in the middle of a write leaves behind is a hidden file of another name."""
    model = tiny_model("gpt_neox", "bridge")
    first = run(model, tmp_path)
    part = next(iter(tmp_path.glob("*.npz")))
    (tmp_path / f".{part.name}.abc.part").write_bytes(part.read_bytes()[:100])
    part.unlink()
    assert same(run(model, tmp_path), first)


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.usefixtures("many_parts")
def test_one_bar_counts_to_its_end(
    tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    model = tiny_model("llama", "bridge")
    run(model, tmp_path, engine=engine)
    next(iter(tmp_path.glob("*.npz"))).unlink()
    capsys.readouterr()
    run(model, tmp_path, engine=engine, progress=True)
    lines = capsys.readouterr().err.replace("\n", "\r").split("\r")
    shown = [line for line in lines if "FLOP" in line]
    assert all(line.startswith("sweep: 57 x 4: ") for line in shown)  # one bar and no other
    assert "100%" in shown[-1]


def test_cut_covers_everything_once() -> None:
    shards = cut(5, [float(i % 7) for i in range(100)], 2, 30.0)
    cells = [(r, i) for s in shards for r in s.rows for i in s.items]
    assert sorted(cells) == [(r, i) for r in range(5) for i in range(100)]
    assert len({s.name for s in shards}) == len(shards)


def test_the_cut_of_the_first_run_is_kept(tmp_path: Path) -> None:
    begun = [Shard(range(2), range(3)), Shard(range(2, 4), range(3))]
    ShardStore(tmp_path, {"the model": "a"}, begun)
    later = ShardStore(tmp_path, {"the model": "a"}, [Shard(range(4), range(3))])
    assert later.shards == begun
    assert json.loads((tmp_path / "manifest.json").read_text())["parts"][1] == [2, 4, 0, 3]


def test_parts_are_cut_where_they_cost_too_much_but_not_below_16_interventions() -> None:
    def items(costs: list[float], most: float, n: int = 2) -> list[range]:
        return [shard.items for shard in cut(n, costs, 4, most)]

    assert items([1.0] * 40, 40.0) == [range(20), range(20, 40)]  # two rows: 40 exactly, no more
    assert items([1.0] * 40, 39.9) == [range(19), range(19, 38), range(38, 40)]
    assert items([1.0] * 40, 40.0, n=1) == [range(40)]
    assert items([1.0] * 40, 0.0) == [range(16), range(16, 32), range(32, 40)]
    assert items([9.0, *[1.0] * 35], 40.0) == [range(16), range(16, 36)]  # the cost starts anew
    assert items([], 40.0) == [range(0)]
    assert [shard.rows for shard in cut(5, [1.0], 2, 1.0)] == [range(2), range(2, 4), range(4, 5)]
    assert (part_limit("cpu"), part_limit("cuda"), part_limit("xpu")) == (1e12, 1e15, 1e15)


@pytest.mark.parametrize(
    ("of_rows", "at_once", "blocks"),
    [
        (3, 1, [3, 3, 3, 3, 3, 3, 2]),  # whole parts
        (3, 5, [3, 3, 3, 3, 3, 5]),
        (3, 6, [6, 6, 6, 2]),
        (3, 100, [20]),
        (20, 1, [8, 8, 4]),  # a part of more than eight times what is read at once
        (20, 2, [16, 4]),
        (20, 3, [20]),
    ],
)
def test_parts_join_to_the_whole_in_memory_and_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_rows: int, at_once: int, blocks: list[int]
) -> None:
    """Random numbers, cut by hand; a `target` axis is narrower in the first part than in the others."""
    n, n_items, rng = 20, 7, np.random.default_rng(0)
    parts = [
        Shard(range(i, min(i + of_rows, n)), items)
        for i in range(0, n, of_rows)
        for items in (range(4), range(4, 7))
    ]
    flat = rng.random((n, n_items)).astype(np.float32)
    deep = rng.random((n, n_items, 3))
    deep[: parts[0].rows.stop, :, 2] = np.nan
    base = rng.random(n)
    store = ShardStore(tmp_path, {"the model": "a"}, parts)
    for part in parts:
        rows, items = slice(part.rows.start, part.rows.stop), slice(part.items.start, part.items.stop)
        own = deep[rows, items]
        own = own[..., :2] if part.rows.start == 0 < n - of_rows else own
        store.save(part, {"flat": base[rows]}, {"flat": flat[rows, items], "deep": own})

    held = store.joined()
    asked: list[int] = []
    with monkeypatch.context() as context:
        context.setattr(shards_module, "stays_in_file", lambda size: asked.append(size) or len(asked) == 2)
        context.setattr(shards_module, "rows_at_once", lambda size: asked.append(size) or at_once)
        left = store.joined(stretch=2.0)
    cell = 2 * (4 + 8 * (2 if of_rows < n else 3))
    cells = [len(part.rows) * len(part.items) for part in parts[:2]]
    per_row = 2 * n_items * (4 + 8 * 3)
    assert asked == [cells[0] * cell, sum(cells) * cell, per_row]  # nothing is held after that
    for found_base, values in (held, left):
        np.testing.assert_array_equal(found_base["flat"], base)
        assert list(values) == ["flat", "deep"]
        for name, whole in (("flat", flat), ("deep", deep)):
            assert values[name].shape == whole.shape
            assert values[name].dtype == whole.dtype
            np.testing.assert_array_equal(np.asarray(values[name]), whole)
    assert list(left[1]["flat"].chunks[0]) == blocks  # pyright: ignore[reportAttributeAccessIssue]


def test_only_the_parts_of_a_block_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Shard(range(i, i + 2), range(1)) for i in range(0, 8, 2)]
    store = ShardStore(tmp_path, {"the model": "a"}, parts)
    monkeypatch.setattr(shards_module, "stays_in_file", lambda size: True)
    monkeypatch.setattr(shards_module, "rows_at_once", lambda size: 4)
    joined = Parts(store)
    for part in parts:
        values = {"x": np.arange(part.rows.start, part.rows.stop, dtype=float)[:, None]}
        store.save(part, {}, values)
        joined.add(part, {}, values)
    whole = joined.joined()[1]["x"]
    read: list[range] = []
    finished = store.finished
    monkeypatch.setattr(store, "finished", lambda shard: read.append(shard.rows) or finished(shard))
    assert np.asarray(whole[4:6]).tolist() == [[4.0], [5.0]]
    assert read == [range(4, 6), range(6, 8)]  # one block
    (tmp_path / parts[3].name).unlink()
    assert np.asarray(whole[:4]).tolist() == [[0.0], [1.0], [2.0], [3.0]]
    with pytest.raises(ResultError, match=f"{parts[3].name} is gone"):
        np.asarray(whole)
