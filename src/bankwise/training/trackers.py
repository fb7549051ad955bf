"""Trackers beside the run's own files (`report_to`): refused before work starts where they cannot be loaded, and one
tracker run for every training."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from bankwise.errors import ConfigError

_MODULES = {
    "azure_ml": ("azureml", "azureml-core"), "comet_ml": ("comet_ml", "comet-ml"), "flyte": ("flytekit", "flytekit")
}  # fmt: skip
"""Module and package where they are not called like the tracker."""


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Raise `ConfigError` for a tracker that transformers does not know, or whose package is not installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to={name!r} is no tracker that transformers knows; choose from "
                f"{', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        module, package = _MODULES.get(name, (name, name))
        # kubeflow is a service of the cluster, with nothing to install.
        if name != "kubeflow" and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"report_to={name!r} needs the package {package}: pip install {package}, or take it out of report_to"
            )


@contextmanager
def own_tracker_run() -> Iterator[None]:
    """Close the W&B run that a training opened: transformers leaves it open, and the next model would log into it.

    A run that was open before, such as a sweep's, stays open and takes everything.
    """
    is_given = _wandb_is_open()
    yield
    if not is_given and _wandb_is_open():
        sys.modules["wandb"].finish()


def _wandb_is_open() -> bool:
    return getattr(sys.modules.get("wandb"), "run", None) is not None
