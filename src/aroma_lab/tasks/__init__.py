"""Tasks: the eight of GLUE and any set of one's own, with what is reported kept apart from the rest."""

from __future__ import annotations

from .glue import GLUE, GlueTask, glue_task
from .load import load_task
from .score import METRICS, score, task_metrics
from .spec import HELD_OUT, TaskData, TaskSpec

__all__ = [
    "GLUE",
    "HELD_OUT",
    "METRICS",
    "GlueTask",
    "TaskData",
    "TaskSpec",
    "glue_task",
    "load_task",
    "score",
    "task_metrics",
]
