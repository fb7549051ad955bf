"""Dense checkpoint -> sparse checkpoint: loading, calibration, permutation, predictor initialisation."""

from bankwise.upcycle.convert import Conversion, calibration_windows, convert, sparse_twin, upcycle
from bankwise.upcycle.loading import describe_model, load_dense, load_model

__all__ = [
    "Conversion",
    "calibration_windows",
    "convert",
    "describe_model",
    "load_dense",
    "load_model",
    "sparse_twin",
    "upcycle",
]
