"""A job's place in SageMaker's containers: where inputs lie, where outputs go, and on how many hosts it runs."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ranks


@dataclass(frozen=True)
class Job:
    """Where one kind of job finds its inputs and leaves its outputs."""

    inputs: Path
    outputs: Path
    config: Path
    message: Path
    training: bool

    @classmethod
    def here(cls, root: Path) -> "Job":
        """Return the job whose contract lies below `root`: SageMaker writes another one for each kind."""
        output = root / "output"
        if (root / "input" / "config" / "resourceconfig.json").is_file():
            return cls(root / "input/data", root / "model", root / "input/config", output / "failure", training=True)
        processing = root / "processing"
        return cls(processing / "input", processing / "output", root / "config", output / "message", training=False)

    def read(self, name: str) -> dict[str, Any]:
        """Return one of SageMaker's configuration files; empty when it was not written."""
        path = self.config / name
        return json.loads(path.read_bytes()) if path.is_file() else {}

    def command(self) -> list[str]:
        """Return what starts the component's process, or its processes on each host and GPU of a Training job."""
        resources = self.read("resourceconfig.json")
        hosts, current = sorted(resources.get("hosts") or ["algo-1"]), resources.get("current_host", "algo-1")
        processes = max(1, ranks.gpus())
        if not self.training or len(hosts) * processes == 1:
            return [sys.executable]
        return ranks.torchrun(hosts, current, processes)

    @property
    def leads(self) -> bool:
        """Whether rank 0 runs on this host."""
        resources = self.read("resourceconfig.json")
        return not self.training or not resources or resources["current_host"] == sorted(resources["hosts"])[0]
