"""Benchmark tasks under interventions, and what an intervention costs on them."""

from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.inspect_model import as_inspect
from memlens.instruments.tasks.lm_eval import LM_EVAL_TASKS, as_lm_eval
from memlens.instruments.tasks.lm_eval import tasks_from_lm_eval as from_lm_eval
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.organisms.local_tasks import local_tasks
from memlens.results.statistics.tasks import task_summary
from memlens.results.statistics.tradeoff import edit_tradeoff, join_frontier

__all__ = [
    "LM_EVAL_TASKS",
    "ChoiceTask",
    "as_inspect",
    "as_lm_eval",
    "edit_tradeoff",
    "evaluate_tasks",
    "from_lm_eval",
    "join_frontier",
    "local_tasks",
    "task_summary",
]
