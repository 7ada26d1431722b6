"""Compiles the kernels with g++ into shared objects that run them on the CPU; cached under ``build/cuda_on_cpu``.

Three flavours of the same sources: ``fast`` (plain), ``checker`` (every access reported to runtime/checker.cpp) and
``asan`` (address and undefined-behaviour sanitizers).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
FLAVOURS = ("fast", "checker", "asan")

_COMMON = [
    "-x", "c++", "-std=c++20", "-fPIC", "-g1", "-fno-omit-frame-pointer",
    "-fno-gnu-unique", "-fno-threadsafe-statics", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-parameter", "-DVAREID_CUDA_ON_CPU",
    "-I", str(HERE / "include"), "-I", str(HERE / "runtime"), "-I", str(ROOT / "csrc"), "-I", str(KERNELS),
]  # fmt: skip
_DEFINE = {"fast": [], "checker": ["-DCUDA_ON_CPU_CHECKER"], "asan": ["-DCUDA_ON_CPU_ASAN"]}
_KERNEL_FLAGS = {
    "fast": ["-O1", "-g0"],
    # Scalar replacement would split a float4 access in four and falsify the traffic.
    "checker": ["-O1", "-fno-tree-sra", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
    # -Og compiles in 60 % of the time of -O1.
    "asan": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr",
             "-fsanitize-recover=address,undefined"],
}  # fmt: skip
_LINK_FLAGS = {"fast": ["-Wl,-z,defs"], "checker": ["-Wl,-z,defs"], "asan": ["-fsanitize=address,undefined"]}
# What g++ says of a feature that the harness does not have, and what to do instead.
_UNSUPPORTED = (
    (r"<<<", "the <<<...>>> launch: call vareid::launch (csrc/cuda/launch.h)"),
    (r"extern\s+__shared__", "extern __shared__: write DYN_SHARED(T, name) (csrc/cuda/launch.h)"),
    (r"cooperative_groups", "cooperative groups: use __syncthreads, __syncwarp and the _sync warp operations"),
    (r"\bcub\b", "CUB: write the block or warp operation with shared memory or shuffles"),
    (r"\bmma\.h|nvcuda|wmma", "tensor-core fragments (mma.h): write the plain multiply-add, guard the variant"),
    (r"cuda_pipeline|cuda/pipeline|cp_async|memcpy_async", "asynchronous copies (cuda_pipeline.h): load to registers"),
    (r"curand", "cuRAND: pass random numbers in"),
    (r"inline PTX", "inline PTX: use an intrinsic"),
    (r"__activemask", "__activemask: state the mask of the lanes that take part"),
    (r"__reduce_\w+_sync", "the __reduce_*_sync operations need sm_80: reduce with shuffles"),
    (r"__nanosleep", "__nanosleep: blocks run one after another, so never wait for another block"),
    (r"cudaLaunch\w+", "cudaLaunch*: call vareid::launch (csrc/cuda/launch.h)"),
    (r"was not declared|does not name a type|has not been declared",
     "a name that tests/cuda_on_cpu/include does not have: add it there if a CPU can do it"),
)  # fmt: skip


_refused: dict[str, str] = {}  # by the object's key: what a whole session of tests need not compile again


class BuildError(RuntimeError):
    """g++ refused a source; the text holds its messages."""


@functools.cache
def missing_reason() -> str:
    """Why the kernels cannot be built here, or ""."""
    if platform.machine() != "x86_64":
        return f"the CUDA-on-CPU tests switch threads in x86-64 assembler; this is {platform.machine()}"
    for tool in ("g++", "nm", "addr2line"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (the CUDA-on-CPU tests need g++ 12 or newer and binutils)"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.split(".")[0]) < 12:
        return f"g++ {version} is too old (the CUDA-on-CPU tests need g++ 12 or newer)"
    return ""


def cache_folder() -> Path:
    return ROOT / "build" / "cuda_on_cpu"


@functools.cache
def _compiler_identity() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _headers_digest(with_kernel_headers: bool) -> str:
    digest = hashlib.sha256(_compiler_identity().encode())
    patterns = [(HERE / "include", "**/*.h*"), (HERE / "include", "**/*.cuh")]
    patterns += [(HERE / folder, "*.h") for folder in ("runtime", "launchers")]
    headers = [path for folder, pattern in patterns for path in folder.glob(pattern)]
    headers.append(ROOT / "csrc" / "dtype.h")
    if with_kernel_headers:
        headers += [*(ROOT / "csrc").glob("*.h"), *KERNELS.glob("*.h"), *KERNELS.glob("*.cuh")]
    for path in sorted(headers):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _compile(source: Path, flags: Sequence[str], folder: Path) -> Path:
    """The object file of a source, compiled unless the cache has it."""
    headers = _headers_digest(source.parent != HERE / "runtime")
    key = hashlib.sha256("\0".join([headers, str(source), *flags]).encode() + source.read_bytes()).hexdigest()
    target = folder / f"{source.stem}-{key[:20]}.o"
    if target.exists():
        return target
    if key in _refused:
        raise BuildError(_refused[key])
    partial = target.with_suffix(f".{os.getpid()}.partial")
    # A path relative to the repository keeps it readable in messages.
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else str(source)
    command = ["g++", *_COMMON, *flags, "-c", name, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        hints = [
            f"not supported in the CUDA-on-CPU tests: {hint}"
            for pattern, hint in _UNSUPPORTED
            if re.search(pattern, done.stderr)
        ]
        _refused[key] = "\n".join([*hints, f"{name} does not compile:", done.stderr])
    elif "warning:" in done.stderr:
        _refused[key] = f"{name} compiles with warnings:\n{done.stderr}"
    if key in _refused:
        partial.unlink(missing_ok=True)
        raise BuildError(_refused[key])
    partial.replace(target)
    return target


def _jobs(kernels: Sequence[Path], glue: Sequence[Path], flavour: str) -> list[tuple[Path, tuple[str, ...]]]:
    """The sources of a shared object, each with its flags, in the order in which they are linked."""
    parts = ["scheduler", "memory", "export"]
    parts += {"fast": [], "checker": ["checker", "traffic"], "asan": ["asan_report"]}[flavour]
    # The linker keeps the first copy of an inline function: the runtime's, which is not instrumented.
    jobs = [(HERE / "runtime" / f"{part}.cpp", ("-O2", *_DEFINE[flavour])) for part in parts]
    jobs += [(source, ("-O0",)) for source in glue]  # the same object in every flavour
    return jobs + [(source, (*_KERNEL_FLAGS[flavour], *_DEFINE[flavour])) for source in kernels]


def _compile_all(jobs: Sequence[tuple[Path, tuple[str, ...]]]) -> list[Path]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # two test sessions must not compile the same thing twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            return list(pool.map(lambda job: _compile(job[0], job[1], folder), jobs))


def build(name: str, kernels: Sequence[Path], glue: Sequence[Path], flavour: str) -> Path:
    """A shared object of the kernels, their glue and the runtime; BuildError where a source does not compile.

    Args:
        name: Base name of the shared object.
        kernels: Sources that hold kernels; these are instrumented.
        glue: Sources that are not.
        flavour: One of ``FLAVOURS``.
    """
    objects = _compile_all(_jobs(kernels, glue, flavour))
    key = hashlib.sha256("\0".join([flavour, *map(str, objects)]).encode()).hexdigest()
    target = cache_folder() / f"{name}-{flavour}-{key[:20]}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = ["g++", "-shared", "-Wl,-Bsymbolic", *_LINK_FLAGS[flavour], *map(str, objects), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{name} does not link:\n{done.stderr}")
        partial.replace(target)
    return target


def _package_sources() -> tuple[list[Path], list[Path]]:
    kernels = [path for path in sorted(KERNELS.glob("*.cu")) if path.stem != "device"]  # a probe without a launcher
    return kernels, sorted((HERE / "launchers").glob("*.cpp"))


@functools.cache
def _compile_every_flavour() -> None:
    """All objects of a session at once, so that no processor waits at the end of each flavour."""
    kernels, glue = _package_sources()
    jobs = dict.fromkeys(job for flavour in reversed(FLAVOURS) for job in _jobs(kernels, glue, flavour))
    _compile_all(list(jobs))


def build_package(flavour: str) -> Path:
    """All kernels of the package with the glue of ``launchers/``."""
    _compile_every_flavour()
    return build("kernels", *_package_sources(), flavour)


def build_planted(flavour: str) -> Path:
    """The harness's own example kernels, right ones and defective ones."""
    return build("planted", sorted((HERE / "planted").glob("*.cu")), [], flavour)
