"""Trackers beside the run's own files (`report_to`): refused before work starts where they cannot be loaded."""

import importlib.util
from collections.abc import Sequence

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
