"""``bitnet compare``: models side by side, with the same accounts for all."""
