"""The package's version and the number of the interface between the Python package and its compiled module.

Both stand here only: the build reads them from this file. Raise ``NATIVE_INTERFACE`` whenever a function of the
compiled module changes its name, its arguments or its meaning; a module that carries another number is refused.
"""

__version__ = "0.1.0"
NATIVE_INTERFACE = 18
