"""Mending a checkpoint without touching its codes: labels, trivial tensors, configurations, the index, metadata, missing small files.

``mending`` holds what is to be written and why; ``weights``, ``packed``, ``configs`` and ``sides`` look for what can be mended in a
directory, ``blocks`` in a GGUF; ``writing`` writes it and proves that every other tensor has the bytes that it had.
"""

from converters.repair.mending import Repair
from converters.repair.repairing import Repaired, repair_path

__all__ = ["Repair", "Repaired", "repair_path"]
