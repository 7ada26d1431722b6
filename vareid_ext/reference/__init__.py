"""The formulas in plain PyTorch: one module for each op, the place where its mathematics stands."""
