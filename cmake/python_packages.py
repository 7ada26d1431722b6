"""What the build asks of Python packages, without importing any: run by CMake, not installed.

``torch`` prints the CUDA version of the installed PyTorch, as "13.0"; nothing for a CPU build or none.
``nvcc`` prints the path of the nvcc that the package nvidia-cuda-nvcc installed; nothing where there is none.
``toolkit`` prints which cuda-toolkit of CUDA 13 suits the packages that are installed: "13.0.3", "13.0.*" or "13.*".
"""

import glob
import importlib.metadata
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
elif sys.argv[1] == "toolkit":
    installed = {
        str(d.metadata["Name"]).lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()
    }
    whole = installed.get("cuda-toolkit", "")
    part = installed.get("nvidia-cuda-runtime", installed.get("nvidia-cuda-nvcc", ""))
    choices = [whole, ".".join([*part.split(".")[:2], "*"]), "13.*"]
    print(next(choice for choice in choices if choice.startswith("13.")), end="")
