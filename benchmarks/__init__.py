"""Every claim of speed or memory, each measured beside its rival in the same run and printed as a ratio."""
