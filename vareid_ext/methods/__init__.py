"""The methods, one file each, and one line each in `METHODS`."""

import importlib

from vareid_ext.methods.base import CLAIMS, NORMALIZATIONS, About, Method, Term, TrainingClasses, full_precision
from vareid_ext.methods.two_branch import TwoBranch
from vareid_ext.methods.va_reid import VaReid

METHODS: dict[str, type[Method]] = {
    name: getattr(importlib.import_module(f"{__name__}.{name.replace('-', '_')}"), class_name)
    for name, class_name in {
        "va-reid": "VaReid",
        "two-branch": "TwoBranch",
        "srb": "Srb",
        "pcb": "Pcb",
        "pcb-rpp": "PcbRpp",
        "mgn": "Mgn",
        "hpm": "Hpm",
        "pyramid": "Pyramid",
        "pie": "Pie",
        "pdc": "Pdc",
        "pgr": "Pgr",
        "pngan": "Pngan",
        "pngan-generated": "PnganGenerated",
        "hacnn": "HaCnn",
        "abdnet": "AbdNet",
        "oscnn": "Oscnn",
        "spreid": "Spreid",
        "dsa": "Dsa",
    }.items()
}
"""The methods by the names of the configuration; the class stands in the file of that name, with _ for -."""

__all__ = [
    "CLAIMS",
    "METHODS",
    "NORMALIZATIONS",
    "About",
    "Method",
    "Term",
    "TrainingClasses",
    "TwoBranch",
    "VaReid",
    "full_precision",
]
