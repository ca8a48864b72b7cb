"""Rooflines: operators counted by hand, what binds at the extremes, and devices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import OptionError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.hooks import hook_name
from memlens.models.families import Shape, find_model
from memlens.studies.comparative.plan import counted_edit
from memlens.studies.plans import blank_sequences
from memlens.sweeps import roofline
from memlens.sweeps.operators import KINDS, Operators
from memlens.sweeps.plan import plan_shape, shape_of
from memlens.sweeps.roofline import DEVICES, Device, Roofline, device_for, measured_device
from tests.small import ragged

SHAPE = Shape(
    n_layers=2, d_model=8, n_heads=4, n_kv_heads=2, d_mlp=16, d_vocab=10, gated_mlp=True, itemsize=2
)  # fmt: skip
DEVICE = Device(peak=1e3, bandwidth=1e2)


def large() -> Shape:
    """Pythia-6.9B's shape, in 16 bits."""
    found = find_model("pythia-6.9b")
    assert found is not None
    assert found[1].shape is not None
    return found[1].shape


def ablations(shape: Shape) -> list[ml.Intervention]:
    return [
        counted_edit("z", [layer], head) for layer in range(shape.n_layers) for head in range(shape.n_heads)
    ]


def by_kind(counted: Operators) -> dict[str, tuple[int, int, int]]:
    line = Roofline.of(counted, DEVICE, weights=0, activations=0)
    return {cost.kind: (cost.calls, cost.flops, cost.bytes) for cost in line.operators}


def test_a_layer_is_counted_as_by_hand() -> None:
    """Two rows of three positions; four heads of width 2, two of keys and values, a gated MLP of 16 units."""
    counted = Operators(SHAPE)
    counted.layer(rows=2, positions=6, keys=3)
    assert by_kind(counted) == {
        "queries, keys and values": (1, 2 * 6 * 8 * 16, 2 * (6 * 8 + 8 * 16 + 6 * 16)),
        "attention": (1, 2 * 2 * 6 * 3 * 8, 2 * (6 * 8 + 2 * 2 * 3 * 8 + 6 * 8)),
        "attention output": (1, 2 * 6 * 8 * 8, 2 * (6 * 8 + 8 * 8 + 6 * 8)),
        "MLP in": (1, 2 * 6 * 8 * 32, 2 * (6 * 8 + 8 * 32 + 6 * 32)),
        "MLP out": (1, 2 * 6 * 16 * 8, 2 * (6 * 16 + 16 * 8 + 6 * 8)),
        # attention's norm, the rotation of queries and keys, two sums; the MLP's norm and activation
        "norms and elementwise": (2, 0, 2 * 6 * (2 * 8 + 2 * 8 + 2 * 4 + 6 * 8 + 2 * 8 + 3 * 16)),
        # joined weights of queries, keys and values; keys and values repeated for four heads
        "copies": (1, 0, 2 * (2 * 8 * 16 + 2 * 2 * 3 * 8)),
    }


def test_the_last_layer_is_queried_where_asked_and_logits_in_portions() -> None:
    counted = Operators(SHAPE)
    counted.layer(rows=2, positions=6, keys=3, queries=2)
    counted.unembed(5, most=2)
    found = by_kind(counted)
    assert found["queries, keys and values"][:2] == (2, 2 * 6 * 8 * 8 + 2 * 2 * 8 * 8)
    assert found["MLP out"][1] == 2 * 2 * 16 * 8
    # two portions of two positions and one of one: the weight is read three times
    assert found["unembedding"] == (3, 2 * 5 * 8 * 10, 2 * (5 * 8 + 3 * 8 * 10 + 5 * 10))
    assert found["metrics"] == (3, 0, 5 * 10 * (8 * 4 + 2 + 4))


def test_the_models_own_blocks_keep_the_pattern_and_join_no_weights() -> None:
    own, functional = Operators(SHAPE), Operators(SHAPE)
    own.layer(rows=2, positions=6, keys=3, own=True)
    functional.layer(rows=2, positions=6, keys=3)
    assert own.flops == functional.flops
    a, b = by_kind(own), by_kind(functional)
    assert a["attention"][2] - b["attention"][2] == 2 * 6 * 6 * 3 * 4
    assert b["copies"][2] - a["copies"][2] == 2 * 2 * 8 * 16


def test_a_layer_without_gates_and_shared_heads_and_how_often() -> None:
    plain = replace(SHAPE, n_kv_heads=4, gated_mlp=False, itemsize=4)
    counted = Operators(plain)
    counted.layer(rows=2, positions=6, keys=3, times=5)
    counted.unembed(4, most=2)
    found = by_kind(counted)
    assert found["queries, keys and values"] == (5, 5 * 2 * 6 * 8 * 24, 5 * 4 * (6 * 8 + 8 * 24 + 6 * 24))
    assert found["attention"] == (5, 5 * 4 * 6 * 3 * 8, 5 * 4 * (6 * 8 + 2 * 2 * 3 * 8 + 6 * 8))
    assert found["MLP in"] == (5, 5 * 2 * 6 * 8 * 16, 5 * 4 * (6 * 8 + 8 * 16 + 6 * 16))
    moved = 2 * 8 + 2 * 8 + 2 * 8 + 6 * 8 + 2 * 8 + 2 * 16
    assert found["norms and elementwise"] == (10, 0, 5 * 4 * 6 * moved)
    assert found["copies"] == (5, 0, 5 * 4 * 2 * 8 * 24)  # nothing is repeated for heads that share
    assert found["unembedding"][0] == 2  # without a rest
    assert found["metrics"] == (2, 0, 4 * 10 * 8 * 4)  # without a copy in float32
    assert counted.flops == sum(flops for _, flops, _ in found.values())

    twice = Operators(plain)
    twice.mlp(6)
    before, flops = by_kind(twice), twice.flops
    twice.add(counted, 3)
    assert twice.flops == flops + 3 * counted.flops
    for kind, sums in by_kind(twice).items():
        old = before.get(kind, (0, 0, 0))
        assert sums == tuple(a + 3 * b for a, b in zip(old, found[kind], strict=True))
    own = Operators(plain)
    own.layer(rows=1, positions=2, keys=3, own=True)
    assert "copies" not in by_kind(own)


def test_a_roofline_sums_the_least_time_of_each_call() -> None:
    """At 1000 operations and 100 bytes per second."""
    counted = Operators(SHAPE)
    counted.calls["MLP out", 500, 10] = 2  # 0.5 s of arithmetic each
    counted.calls["MLP out", 100, 30] = 3  # 0.3 s of memory each
    counted.calls["MLP in", 100, 10] = 1  # 0.1 s of either, which is called arithmetic
    counted.calls["copies", 0, 40] = 4
    line = Roofline.of(counted, DEVICE, weights=3 * 10**9, activations=10**9)
    assert [cost.kind for cost in line.operators] == ["MLP in", "MLP out", "copies"]  # as in `KINDS`
    table = line.to_frame()
    assert list(table) == [
        *("kind", "calls", "flops", "bytes", "seconds", "memory_seconds", "intensity", "bound", "share")
    ]
    assert table["calls"].tolist() == [1, 5, 4]
    assert table["flops"].tolist() == [100, 1300, 0]
    assert table["bytes"].tolist() == [10, 110, 160]
    assert table["seconds"].tolist() == pytest.approx([0.1, 1.9, 1.6])
    assert table["memory_seconds"].tolist() == pytest.approx([0, 0.9, 1.6])
    assert table["intensity"].tolist() == pytest.approx([10, 1300 / 110, 0])
    assert table["bound"].tolist() == ["arithmetic", "arithmetic", "memory"]
    assert table["share"].tolist() == pytest.approx([0.1 / 3.6, 1.9 / 3.6, 1.6 / 3.6])
    assert line.seconds == pytest.approx(3.6)
    assert line.memory_share == pytest.approx(2.5 / 3.6)
    left_out = "; not counted: launches of kernels, Python and other work of the host, "
    assert str(line).startswith(
        "on a device of your own at least 3.6 s, 69% of it bound by memory; 3.0 GB of weights and 1.0 of "
        f"activations are needed{left_out}"
    )
    for memory, fits in ((4e9, "fit into 4 GB"), (3.9e9, "do not fit into 4 GB")):
        there = replace(line, device=replace(DEVICE, memory=memory))
        assert there.fits == (memory == 4e9)
        assert f"of activations {fits}{left_out}" in str(there)
    del counted.calls["copies", 0, 40]
    faster = Roofline.of(counted, DEVICE, weights=0, activations=0)
    assert (faster.bound, faster.memory_share) == ("arithmetic", pytest.approx(0.45))
    assert "2 s, 55% of it bound by arithmetic; 0.0 GB" in str(faster)
    assert Roofline.of(Operators(SHAPE), DEVICE, weights=0, activations=0).memory_share == 0


def test_a_device_by_its_name_with_its_published_rates() -> None:
    cpu, half = torch.device("cpu"), torch.float16
    found = device_for("H100-SXM", cpu, half)
    assert (found.peak, found.float32, found.bandwidth) == (989e12, 67e12, 3350e9)
    assert (found.memory, found.kind, found.name) == (80e9, "cuda", "h100-sxm")
    assert [found.rate(size) for size in (1, 2, 4)] == [989e12, 989e12, 67e12]
    assert found.seconds(67e12, 3350e9 / 2, itemsize=4) == 1
    assert found.seconds(67e12, 3350e9 * 2, itemsize=4) == 2
    assert device_for(DEVICE, cpu, half) is DEVICE
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "measured_device", lambda *args: asked.append(args) or DEVICE)
        assert device_for("Here", cpu, half) is DEVICE
    assert asked == [(cpu, half)]
    with pytest.raises(OptionError, match=r"choose from .*, here, or give"):
        device_for("there", cpu, half)


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_the_operators_are_those_of_the_plan(tiny_model: Any, family: str) -> None:
    model, seqs = tiny_model(family), ragged()
    edits = [*ml.edits.head_ablations(model, seqs), *ml.edits.attention_bypasses(model)]
    edits += [
        counted_edit("resid_pre", [1]),
        ml.Intervention("embedding", [("hook_embed", lambda x, hook: x)]),
    ]
    cost = ml.plan(model, seqs, edits, on=DEVICE, batch_size=3)
    assert cost.roofline is not None
    assert sum(c.flops for c in cost.roofline.operators) == cost.block_flops + cost.unembed_flops
    assert cost.expected_seconds is None
    assert {c.kind for c in cost.roofline.operators} == set(KINDS)
    assert cost.roofline.weights == sum(p.numel() * 4 for p in model.parameters())
    assert plan_shape(shape_of(model), seqs, edits, on=DEVICE, batch_size=3).block_flops == cost.block_flops
    assert str(cost).count("not counted: launches of kernels") == 1


def doubled_from(position: int) -> Any:
    def hook(resid: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([resid[:, :position], 2 * resid[:, position:]], 1)

    return hook


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_layers_are_counted_in_the_stacks_in_which_they_run(
    tiny_model: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, positions and queries of every call of a functional block, against those that were counted."""
    model = tiny_model(family)
    seqs = ml.SequenceSet.from_tokens(torch.arange(1, 61).reshape(5, 12), 6)
    edits = ml.edits.head_ablations(model, seqs, mode="zero")
    edits += [
        ml.Intervention(
            f"{layer}, {at}", [(hook_name("resid_pre", layer), doubled_from(at))], first_position=at
        )
        for layer in range(3)
        for at in (3, 5, 9)
    ]
    edits = [ml.Intervention(f"{n}", e.hooks, first_position=e.first_position) for n, e in enumerate(edits)]
    budget: dict[str, Any] = {"memory_budget": 2**18, "batch_size": 3}
    ml.sweep(model, seqs, edits, progress=False, **budget)  # the blocks are compared with the model once
    counted: Counter[Any] = Counter()
    ran: Counter[Any] = Counter()
    layer, run, together = Operators.layer_of, FunctionalBlocks.run, FunctionalBlocks.run_together

    def count(self: Any, stacks: Any, *, own: bool = False, times: int = 1) -> None:
        if not own and sum(rows for rows, *_ in stacks) > 1:  # each intervention is counted on one row
            counted[tuple(sorted((r, n, n if asked is None else asked) for r, n, _, asked in stacks))] += (
                times
            )
        layer(self, stacks, own=own, times=times)

    def sizes(resid: Any, past: Any = None, queries: Any = None) -> tuple[int, int, int]:
        positions = resid.shape[0] * resid.shape[1]
        return len(resid), positions, positions if queries is None else queries.numel()

    def note(self: Any, at: int, *stack: Any, **how: Any) -> Any:
        ran[(sizes(*stack),)] += 1
        return run(self, at, *stack, **how)

    def note_all(self: Any, at: int, stacks: Any) -> Any:
        if len(stacks) > 1:  # one stack alone goes through `run`
            ran[tuple(sorted(sizes(*stack) for stack in stacks))] += 1
        return together(self, at, stacks)

    monkeypatch.setattr(Operators, "layer_of", count)
    monkeypatch.setattr(FunctionalBlocks, "run", note)
    monkeypatch.setattr(FunctionalBlocks, "run_together", note_all)
    ml.sweep(model, seqs, edits, progress=False, **budget)
    ml.plan(model, seqs, edits, on=Device(1e12, 1e12, kind="cpu"), **budget)
    assert ran == counted
    assert len(ran) > 4
    assert max(map(len, ran)) > 2  # some layers run on stacks of different lengths


def test_time_falls_with_either_rate_and_halves_with_both() -> None:
    shape, seqs = large(), blank_sequences(8, 64, 32)
    edits = ablations(shape)[::16]

    def seconds(peak: float, bandwidth: float) -> float:
        found = plan_shape(shape, seqs, edits, on=Device(peak, bandwidth, memory=80e9)).roofline
        assert found is not None
        return found.seconds

    base = seconds(1e14, 1e12)
    assert seconds(2e14, 2e12) == pytest.approx(base / 2)
    assert base / 2 < seconds(2e14, 1e12) < base
    assert base / 2 < seconds(1e14, 2e12) < base


def test_memory_binds_few_positions_and_arithmetic_binds_stacks() -> None:
    shape = large()
    one = plan_shape(shape, blank_sequences(1, 8, 4), [], on="h100-sxm").roofline
    many = plan_shape(shape, blank_sequences(64, 64, 32), ablations(shape)[::16], on="H100-SXM").roofline
    assert one is not None
    assert many is not None
    assert (one.bound, many.bound) == ("memory", "arithmetic")
    # products read every weight once, and little else
    products = sum(cost.seconds for cost in one.operators if cost.flops)
    assert shape.n_params * 2 * 0.95 < products * 3350e9 < shape.n_params * 2 * 1.1
    # the share of the peak that the stacks reach
    assert 0.6 < sum(c.flops for c in many.operators) / many.seconds / 989e12 < 1
    for rate in ({"peak": 1e30}, {"bandwidth": 1e30}):
        extreme = replace(DEVICES["h100-sxm"], float32=None, **rate)
        line = plan_shape(shape, blank_sequences(8, 64, 32), [], on=extreme).roofline
        assert line is not None
        assert line.bound == ("memory" if "peak" in rate else "arithmetic")
        assert line.memory_share == pytest.approx(1.0 if "peak" in rate else 0.0)
        matrices = line.to_frame().set_index("kind").loc["MLP in"]
        assert matrices["bound"] == line.bound


def test_larger_stacks_read_the_weights_less_often() -> None:
    shape, seqs = large(), blank_sequences(8, 64, 32)
    narrow, wide = (
        plan_shape(shape, seqs, ablations(shape)[::16], memory_budget=size, batch_size=8, on="h200")
        for size in (2**30, 2**34)
    )
    assert narrow.roofline is not None
    assert wide.roofline is not None
    assert narrow.block_flops == wide.block_flops
    matrices = [
        next(c for c in line.operators if c.kind == "MLP in") for line in (narrow.roofline, wide.roofline)
    ]
    assert matrices[0].calls > 2 * matrices[1].calls
    assert matrices[0].bytes > matrices[1].bytes
    assert wide.roofline.activations > narrow.roofline.activations


def test_what_fits() -> None:
    found = find_model("pythia-12b")
    assert found is not None
    assert found[1].shape is not None
    seqs, wide = blank_sequences(1, 64, 32), replace(found[1].shape, itemsize=4)
    fits = {
        (name, shape.itemsize): line.fits
        for name in ("a100-40gb", "h100-sxm")
        for shape in (found[1].shape, wide)
        if (line := plan_shape(shape, seqs, [], on=name).roofline)
    }
    assert fits == {
        ("a100-40gb", 2): True, ("a100-40gb", 4): False, ("h100-sxm", 2): True, ("h100-sxm", 4): True,
    }  # fmt: skip
    unknown = plan_shape(wide, seqs, [], on=DEVICE).roofline
    assert unknown is not None
    assert unknown.fits is None


def test_devices() -> None:
    for name, device in DEVICES.items():
        assert device.source.startswith("NVIDIA")
        assert name == device.name
        assert device.rate(2) == device.peak > device.rate(4)
    seqs = blank_sequences(1, 8, 4)
    with pytest.raises(OptionError, match=r"on='h100-sx' is not a device.* Did you mean 'h100-sxm'"):
        plan_shape(SHAPE, seqs, [], on="h100-sx")
    with pytest.raises(OptionError, match="h200 has no figure for float64"):
        plan_shape(replace(SHAPE, itemsize=8), seqs, [], on="h200")
    with pytest.raises(OptionError, match=r"bandwidth=0 of a device"):
        Device(peak=1, bandwidth=0)
    with pytest.raises(OptionError, match="kind='tpu'"):
        Device(peak=1, bandwidth=1, kind="tpu")


def test_a_machine_is_measured() -> None:
    ticks = iter([0, 9, 10, 10.5, 20, 20.25, 30, 39, 40, 41, 50, 52])  # two starts that do not count
    found = measured_device("cpu", torch.float32, repeats=2, clock=lambda: next(ticks))
    assert found.peak == 2 * 2048 * 1024 * 4096 / 0.25
    assert found.bandwidth == 2 * 2**27 / 1
    assert (found.kind, found.memory, found.rate(4), found.rate(8)) == ("cpu", None, found.peak, found.peak)
    assert (found.name, found.source) == ("this cpu", "measured")
