"""Several processes for one step: which command starts them, and who of them may write.

torchrun starts a process per GPU on each host. All run the same component; rank 0 alone writes the outputs, the others
write where nobody looks.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PORT = 7777
"""Where rank 0's host listens; free in SageMaker's containers (its own toolkit uses the same)."""


def gpus() -> int:
    """Return the number of NVIDIA devices of this host, without asking torch."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])


def torchrun(hosts: Sequence[str], current: str, processes: int) -> list[str]:
    """Return the command that starts this host's processes; `-m MODULE …` follows it.

    Args:
        hosts: Of the whole job, in the same order on each.
        current: This host.
        processes: Per host.
    """
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", str(len(hosts)), "--nproc_per_node", str(processes), "--node_rank", str(hosts.index(current))),
        *("--master_addr", hosts[0], "--master_port", str(PORT)),
    ]


def own_outputs(executor_input: dict[str, Any]) -> dict[str, Any]:
    """Return the executor's input for this process: as it is for rank 0, with outputs nobody reads for the others."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return executor_input
    scratch = Path(tempfile.mkdtemp(prefix=f"assay-rank-{rank}-"))
    outputs = executor_input["outputs"]
    return {
        **executor_input,
        "outputs": {
            "parameters": {name: {"outputFile": str(scratch / name)} for name in outputs.get("parameters", {})},
            "artifacts": {
                name: {"artifacts": [{**entry, "uri": str(scratch / name)} for entry in several["artifacts"]]}
                for name, several in outputs.get("artifacts", {}).items()
            },
            # beside rank 0's, so that its error.json is found
            "outputFile": str(Path(outputs["outputFile"]).with_name(f"executor_output.{rank}.json")),
        },
    }
