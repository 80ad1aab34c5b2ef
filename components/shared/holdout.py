"""Which groups of a step's rows are kept apart, to measure on what was not trained on."""

import hashlib


def is_held_out(group: str, share: float) -> bool:
    """Return whether a group is among the held-out `share`: by another hash than the one that made the splits.

    The split that rows are from is a narrow range of that hash, which would lie on one side whole.
    """
    return int.from_bytes(hashlib.sha256(f"holdout {group}".encode()).digest()[:8]) / 2**64 < share
