"""Change many things, exactly and fast: interventions, metrics at target positions, the engine."""

from memlens.sweep.contexts import applied
from memlens.sweep.interventions import Batch, BatchHook, ByBatch, Intervention
from memlens.sweep.measure import measure
from memlens.sweep.planner import Plan, plan
from memlens.sweep.sweep import sweep

__all__ = ["Batch", "BatchHook", "ByBatch", "Intervention", "Plan", "applied", "measure", "plan", "sweep"]
