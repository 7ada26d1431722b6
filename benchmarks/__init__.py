"""Benchmarks: speed as ratios within one run, against the reference, a peer and the machine's own limits."""
