"""Great Expectations at the door: accepted rows, quarantined rows, data docs."""
