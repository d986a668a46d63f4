"""The table of metrics."""

from __future__ import annotations

STRUCTURE = {
    "masks/sparsity": "sparsity",
    "masks/overlap": "overlap",
    "model/active_parameters": "active parameters",
    "system/peak_memory_bytes": "peak memory",
}
"""What evaluations say about the model itself, and the titles of these last columns."""
