"""The ops: PyTorch operators whose default implementation is the reference and whose kernels are native."""
