"""Finding the layer that breaks at long context, and mending it alone: `scan`, `repair` and the patch between them."""

from bankwise.repair.patch import Patch, save_repaired
from bankwise.repair.remedies import RepairSettings
from bankwise.repair.repairing import repair
from bankwise.repair.scan_result import Finding, LayerScore, Scan
from bankwise.repair.scanning import scan

__all__ = ["Finding", "LayerScore", "Patch", "RepairSettings", "Scan", "repair", "save_repaired", "scan"]
