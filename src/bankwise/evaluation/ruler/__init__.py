"""RULER: prompts equal to NVIDIA's to the byte, and their scores."""

from bankwise.evaluation.ruler.catalogue import OFFICIAL_TASKS, TASKS, RulerTask, find_task
from bankwise.evaluation.ruler.generate import Generator, check_task, generate, write_jsonl
from bankwise.evaluation.ruler.templates import BASE_TEMPLATE, resolve_template

__all__ = [
    "BASE_TEMPLATE",
    "OFFICIAL_TASKS",
    "TASKS",
    "Generator",
    "RulerTask",
    "check_task",
    "find_task",
    "generate",
    "resolve_template",
    "write_jsonl",
]
