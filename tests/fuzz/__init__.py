"""Mutations of valid files. Not part of a plain `pytest`; see CONTRIBUTING.md."""
