"""``vareid doctor``: what this installation consists of, and whether the main job can run here."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vareid_ext import _native
from vareid_ext._version import __version__
from vareid_ext.cli.common import Result, command_parser, run_command
from vareid_ext.cli.doctor_data import data_report
from vareid_ext.ops._byte_filter import byte_products

_DESCRIPTION = """\
Without DATA: what this installation consists of. Exit status 0 if training can run here, 1 if not.

With DATA: what a data set holds, and what in it will hurt: images that cannot be read, that occur twice, in training
and test, or as different people; queries without a match; people with one image or one camera; missing views. Exit
status 1 if one of them is a problem.
"""
_EXAMPLES = """\
  vareid doctor
  vareid doctor --json > report.json
  vareid doctor photos/
  vareid doctor Market-1501 --viewpoint-file market_image_map_direction.pkl
"""
REQUIRED = (
    "numpy",
    "torch",
    "torchvision",
    "timm",
    "PIL",
    "matplotlib",
    "tqdm",
    "tensorboard",
    "jsonargparse",
    "jinja2",
)
OPTIONAL = {
    "cupy": "CuPy arrays in retrieval",
    "psutil": "memory in the benchmarks",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "vareid export --onnx"),
}
DISTRIBUTION = {"PIL": "pillow"}
GPU_DRIVERS = ("/proc/driver/nvidia/version", "/usr/lib/wsl/lib/libcuda.so.1")  # the second in Windows' Linux
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by CUDA version
CPU_FEATURES = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve",
)  # fmt: skip


def _version(module: str) -> tuple[bool, str]:
    """Whether a package imports, and its version or why it does not."""
    try:
        imported = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: torchvision beside another torch's build
        lines = str(error).splitlines() or [type(error).__name__]
        return False, f"does not import: {lines[0]}"
    try:
        return True, importlib.metadata.version(DISTRIBUTION.get(module, module))
    except importlib.metadata.PackageNotFoundError:  # CuPy's distributions carry the CUDA version in their name
        return True, str(getattr(imported, "__version__", "of unknown version"))


def _cpu() -> tuple[str, list[str]]:
    """The processor's name and those of its features that the kernels or PyTorch make use of."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), []
    text = cpuinfo.read_text()
    values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in values.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [name for name in CPU_FEATURES if name in flags]


def _driver_too_old(cuda: int) -> str:
    """ "" if the driver runs this version of CUDA or its version is unknown, else how to update it."""
    path = Path(GPU_DRIVERS[0])
    found = re.search(r"Module.*?  (\d+)\.[\d.]+", path.read_text()) if path.is_file() else None
    oldest = OLDEST_DRIVER.get(cuda, 0)
    if found is None or int(found[1]) >= oldest:
        return ""
    return f"driver {found[0].split()[-1]} does not run CUDA {cuda}; update it to {oldest} or newer"


def _nvcc_cuda() -> int | None:
    """The CUDA version of the nvcc that a build would take, which looks in the same places."""
    homes = (
        os.environ.get("CUDA_HOME", ""),
        os.environ.get("CUDA_PATH", ""),
        "/usr/local/cuda",
        "/opt/cuda",
        "/usr/lib/cuda",
    )
    places = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)", said)
    return int(found[1]) if found else None


def _how_to_build() -> str:
    """What to type for kernels that this machine's GPUs and driver run."""
    with_cuda_12 = "install a toolkit of CUDA 12 and type: CUDACXX=/path/to/nvcc VAREID_CUDA=ON pip install ."
    nvcc = _nvcc_cuda()
    cuda = nvcc or 13  # PyPI's nvcc is of CUDA 13
    capability = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    if cuda >= 13 and capability < (7, 5):
        return f"CUDA 13 does not know sm_{capability[0]}{capability[1]}; {with_cuda_12}"
    too_old = _driver_too_old(cuda)
    if too_old:
        instead = f", or {with_cuda_12}" if cuda >= 13 and not _driver_too_old(12) else ""
        return f"{too_old} and call vareid doctor again{instead}"
    if nvcc:  # ON, as AUTO goes on without where nvcc compiles nothing
        return "type in the source folder: VAREID_CUDA=ON pip install ."
    return "type in the source folder: VAREID_CUDA=PYPI pip install ."


def _cuda_advice() -> str:
    """Whether the CUDA kernels can run on this machine's GPUs and, if not, which case this is and what to type."""
    if not _native.loaded():
        return "not built; type in the source folder: pip install ."
    if torch.cuda.is_available():
        module = _native.module()
        if not module.with_cuda:
            return f"left out of this build; {_how_to_build()}"
        reasons = map(module.cuda_unusable_reason, range(torch.cuda.device_count()))
        unfit = next(filter(None, reasons), "")
        return f"{unfit}; {_how_to_build()}" if unfit else "they can run"
    if not any(map(os.path.exists, GPU_DRIVERS)):
        return "not needed: there is no NVIDIA driver"
    if torch.version.cuda is None:
        too_old = _driver_too_old(13)  # of the PyTorch that pip installs
        install = "pip install --force-reinstall torch torchvision"
        update = f"{too_old} (or install a PyTorch for CUDA 12), then " if too_old else ""
        return f"there is an NVIDIA driver, but PyTorch is a CPU build; {update}type: {install}"
    too_old = _driver_too_old(int(torch.version.cuda.split(".")[0]))
    if too_old:
        return f"PyTorch is for CUDA {torch.version.cuda}; {too_old}, or install a PyTorch for an older CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"PyTorch sees no GPU: CUDA_VISIBLE_DEVICES is {visible!r}; type: unset CUDA_VISIBLE_DEVICES"
    return "there is an NVIDIA driver, but PyTorch sees no GPU; type: nvidia-smi (a container needs --gpus all)"


def report() -> tuple[list[tuple[str, str]], list[str]]:
    """The lines of the report as (name, value), and the problems that keep the main job from running."""
    lines = [
        ("vareid_ext", f"{__version__} ({Path(__file__).parents[1]})"),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
    ]
    problems = []
    for backend, state in _native.backends().items():
        lines.append((f"backend {backend}", state if state == "native" else f"plain PyTorch: {state}"))
    if _native.loaded():
        module = _native.module()
        lines.append(("compiled module", str(module.__file__)))
        architectures = module.cuda_architectures or "none (built without CUDA)"
        lines.append(("CUDA architectures", architectures))
        lines.append(("products of 8 bits", byte_products() or "none"))
    name, features = _cpu()
    lines.append(("processor", f"{name}, {os.cpu_count()} cores, {' '.join(features) or 'features unknown'}"))
    lines.append(("threads", f"{torch.get_num_threads()} (torch.get_num_threads())"))
    lines.append(("torch CPU kernels", torch.backends.cpu.get_cpu_capability()))
    lines.append(("torch CUDA", str(torch.version.cuda or "none (a CPU build)")))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            memory = device.total_memory / 2**30
            state = _native.unavailable_reason(f"cuda:{index}") or "native"
            what = f"{device.name}, sm_{device.major}{device.minor}, {memory:.1f} GiB"
            lines.append((f"GPU {index}", f"{what}, kernels: {state}"))
    else:
        lines.append(("GPU", "none that PyTorch can use"))
    lines.append(("CUDA kernels", _cuda_advice()))
    for package in REQUIRED:
        works, version = _version(package)
        lines.append((package, version))
        if not works:
            problems.append(f"{package} {version}")
    for package, purpose in OPTIONAL.items():
        works, version = _version(package)
        lines.append((f"{package} (optional)", version if works else f"not usable; needed for {purpose}"))
    return lines, problems


def _run(options: argparse.Namespace) -> Result:
    if options.data is not None:
        return data_report(options)
    lines, problems = report()
    width = max(len(name) for name, _ in lines)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    verdict = "training cannot run here" if problems else "training can run here"
    text = "\n".join([*(f"{name:<{width}}  {value}" for name, value in lines), verdict])
    values = {"can_train": not problems, "problems": problems, **dict(lines)}
    return Result(text, values, status=1 if problems else 0)


def main(arguments: Sequence[str]) -> int:
    """Print the report; 0 if ``vareid train`` can run here, or the data set has no problem, 1 if not."""
    parser = command_parser("doctor", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("data", nargs="?", metavar="DATA", help="a data set: folder, manifest")
    parser.add_argument("--kind", default="auto", metavar="KIND", help="its layout (default: found out)")
    parser.add_argument("--viewpoint-file", metavar="FILE", help="file of viewpoint labels (.pkl, .csv)")
    parser.add_argument("--viewpoints", metavar="NAME,NAME", help="the viewpoints' names: front,rear,left,right")
    parser.add_argument(
        "--viewpoint-bins", type=int, metavar="N", help="number of viewpoints, where labels are degrees"
    )
    return run_command(parser, _run, arguments)
