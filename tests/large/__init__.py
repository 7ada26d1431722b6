"""Sizes beyond 2^31 elements. Not part of a plain `pytest`; see CONTRIBUTING.md."""
