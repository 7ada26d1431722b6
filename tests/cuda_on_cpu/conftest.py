"""A kernel that ends its process must not take the reports along."""

from tests.cuda_on_cpu.worker import pytest_runtest_protocol  # noqa: F401
