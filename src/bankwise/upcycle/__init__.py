"""Dense checkpoint -> sparse checkpoint: loading, calibration, permutation, predictor initialisation."""

from bankwise.upcycle.convert import Conversion, calibration_windows, convert, sparse_twin, upcycle
from bankwise.upcycle.loading import load_dense

__all__ = ["Conversion", "calibration_windows", "convert", "load_dense", "sparse_twin", "upcycle"]
