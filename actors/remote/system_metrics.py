"""System metrics of a node's process: processor, memory, GPU memory."""

from __future__ import annotations

import psutil
import torch


class Usage:
    """Measures this process and its machine; shares of time count since the last ``measure``."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()
        psutil.cpu_percent()

    def measure(self) -> dict[str, float]:
        """Return metrics by name, with units; processor time in percent of one core. Unknown ones are left out."""
        found: dict[str, float] = {}
        try:
            found["cpu_utilization_percentage"] = self._process.cpu_percent()
            found["memory_megabytes"] = self._process.memory_info().rss / 1e6
            found["machine_cpu_utilization_percentage"] = psutil.cpu_percent()
            found["machine_memory_usage_percentage"] = psutil.virtual_memory().percent
            for index in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
                free, total = torch.cuda.mem_get_info(index)
                found[f"gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
                found[f"gpu_{index}_memory_usage_percentage"] = 100.0 * (total - free) / total
        except Exception:  # noqa: BLE001 - a driver that is gone, a process table that cannot be read
            return found
        return found
