"""The methods, one file each."""

from vareid_ext.methods.base import NORMALIZATIONS, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.two_branch import TwoBranch
from vareid_ext.methods.va_reid import VaReid

METHODS: dict[str, type[Method]] = {"va-reid": VaReid, "two-branch": TwoBranch}
"""The methods by the names of the configuration."""

__all__ = ["METHODS", "NORMALIZATIONS", "Method", "Term", "TrainingClasses", "TwoBranch", "VaReid", "full_precision"]
