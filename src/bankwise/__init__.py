"""bankwise: predictor-gated, bank-wise sparse language models by continual training of dense ones.

Importing the package registers the model types `bankwise_llama`, `bankwise_mistral`, `bankwise_qwen2` and
`bankwise_qwen3` with transformers.
"""

__version__ = "0.1.0"

from bankwise import ffn, inference, kernels, models
from bankwise.config import CalibrationConfig, DataSource, EvalConfig, Recipe, SparsityConfig, Stage
from bankwise.evaluation import evaluate
from bankwise.pipeline import RunResult, run, train
from bankwise.repair import repair, scan
from bankwise.upcycle import upcycle

__all__ = [
    "CalibrationConfig",
    "DataSource",
    "EvalConfig",
    "Recipe",
    "RunResult",
    "SparsityConfig",
    "Stage",
    "__version__",
    "evaluate",
    "ffn",
    "inference",
    "kernels",
    "models",
    "repair",
    "run",
    "scan",
    "train",
    "upcycle",
]
