"""What each process of a TrainJob runs under torchrun: the step, as long as its launcher lives."""

import json
import os
import sys
import threading
import time
from pathlib import Path

from .launcher import BEAT_SECONDS, HEARTBEAT

SILENCE = 15
"""Heartbeats that may be missed: five minutes, for a volume that is slow or a node that is drained."""


def main(argv: list[str]) -> int:
    """Run the step of the command line, and end with the launcher."""
    path = Path(argv[argv.index("--executor_input") + 1].removeprefix("@"))
    threading.Thread(target=watch, args=(path.with_name(HEARTBEAT),), daemon=True).start()
    from assay.components.runtime.__main__ import main as run

    return run(argv)


def watch(heartbeat: Path, silence: float = SILENCE * BEAT_SECONDS) -> None:
    """End this process when nobody waits for it any more.

    Args:
        heartbeat: The file that the launcher touches.
        silence: Seconds without a touch after which it is gone.
    """
    while True:
        time.sleep(silence / SILENCE)
        try:
            age = time.time() - heartbeat.stat().st_mtime
        except OSError:
            age = float("inf")
        if age > silence:
            sys.stderr.write(json.dumps({"error": "the launcher is gone", "silent_for_seconds": round(age)}) + "\n")
            os._exit(1)  # torch's own threads would hold up an orderly end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
