"""The suites: each turns a plan and a model into measures. `check` lists what is wrong with a plan before any work."""

from dataclasses import dataclass, field
from typing import Any

from bankwise.evaluation.measures import Measure


@dataclass(kw_only=True)
class SuiteResult:
    """What a suite found out about one model."""

    measures: list[Measure] = field(default_factory=list)
    """Numbers with their items."""

    details: dict[str, Any] = field(default_factory=dict)
    """JSON values that the report draws figures from."""
