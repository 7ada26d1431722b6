"""The renderer of the synthetic data set, in integer arithmetic throughout."""
