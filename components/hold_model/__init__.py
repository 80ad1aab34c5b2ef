"""The other branch of the gate: the ledger learns of the attempt."""
