"""Proves a GPU: ``bash .ci/gpu OUT`` builds for it, checks and measures everything, and writes OUT/gpu_report.json and
OUT/gpu_report.md as it goes. docs/gpu/README.md says how to read them.

``__main__`` runs the steps, each in a process of its own; ``step`` is what the steps share; one file is one step.
"""
