"""What the build asks of Python packages, without importing any: run by CMake, not installed.

``torch`` prints the CUDA version of the installed PyTorch, as "13.0"; nothing for a CPU build or none.
``nvcc`` prints the path of the nvcc that the package nvidia-cuda-nvcc installed; nothing where there is none.
"""

import glob
import importlib.util
import os
import runpy
import sys


def folders(package: str) -> list[str]:
    """Where a package lies that can be imported; a namespace package may lie in several places."""
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations) if spec is not None else []


if sys.argv[1] == "torch":
    for folder in folders("torch"):
        print(runpy.run_path(os.path.join(folder, "version.py")).get("cuda") or "", end="")
elif sys.argv[1] == "nvcc":
    found = [path for folder in folders("nvidia") for path in glob.glob(os.path.join(folder, "cu*", "bin", "nvcc"))]
    print(*found[:1], end="")
