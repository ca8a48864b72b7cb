"""Change many things, exactly and fast: interventions, metrics at target positions, the engine."""

from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Batch, BatchHook, ByBatch, Intervention, Reads
from memlens.sweeps.measure import measure
from memlens.sweeps.planner import Plan, plan
from memlens.sweeps.run import sweep

__all__ = [
    "Batch",
    "BatchHook",
    "ByBatch",
    "Intervention",
    "Plan",
    "Reads",
    "applied",
    "measure",
    "plan",
    "sweep",
]
