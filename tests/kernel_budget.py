"""What the compiled kernels take: registers, shared memory, stack and spills, from ``nvcc -Xptxas -v``.

``python -m tests.kernel_budget`` prints the differences from the budget (tests/kernel_budget.json); ``--update`` writes
a new one.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
BUDGET = ROOT / "tests" / "kernel_budget.json"
ARCHITECTURES = ("75", "80", "90", "120")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture, in registers a thread and bytes."""

    registers: int
    shared: int
    stack: int
    spills: int


@functools.cache
def nvcc() -> str | None:
    """The CUDA compiler, found as the build finds it."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda", "/opt/cuda"]
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


@functools.cache
def missing_reason() -> str:
    """Why nothing can be compiled here, or ""."""
    compiler = nvcc()
    if compiler is None:
        return "nvcc is not installed"
    listed = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    missing = [f"sm_{a}" for a in ARCHITECTURES if f"sm_{a}" not in listed]
    return f"this nvcc does not compile for {', '.join(missing)}" if missing else ""


def compiler_version() -> str:
    """nvcc's release, such as "13.0"."""
    text = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


def compile_log(source: Path) -> str:
    """What nvcc and ptxas say about a source, for every architecture; kept in build/kernel_budget."""
    flags = [
        "-O3",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        f"-I{ROOT / 'csrc'}",
        "-Xcompiler=-Wall,-Wextra",
        "-Xptxas=-v",
    ]
    for a in ARCHITECTURES:
        flags += ["-gencode", f"arch=compute_{a},code=sm_{a}"]
    digest = hashlib.sha256("\0".join([compiler_version(), *flags]).encode() + source.read_bytes())
    for header in sorted([*(ROOT / "csrc").glob("*.h"), *KERNELS.glob("*.h"), *KERNELS.glob("*.cuh")]):
        digest.update(header.read_bytes())
    folder = ROOT / "build" / "kernel_budget"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{source.stem}-{digest.hexdigest()[:20]}.txt"
    if not kept.exists():
        target = kept.with_suffix(f".{os.getpid()}.o")
        command = [str(nvcc()), *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        target.unlink(missing_ok=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}")
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(done.stdout)
        partial.replace(kept)
    return kept.read_text()


def parse(log: str) -> dict[str, dict[str, Usage]]:
    """Usage by kernel and architecture ("sm_80") from the text of ``nvcc -Xptxas -v``."""
    found: dict[str, dict[str, Usage]] = {}
    entries = re.split(r"ptxas info\s+: Compiling entry function ", log)[1:]
    mangled = [re.match(r"'([^']+)' for '([^']+)'", entry) for entry in entries]
    names = _demangle([m[1] for m in mangled if m])
    for name, match, entry in zip(names, mangled, entries, strict=True):
        assert match is not None
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers", entry)
        if frame is None or used is None:
            raise ValueError(f"nvcc's report on {name} is not understood:\n{entry}")
        shared = re.search(r"(\d+) bytes smem", entry)
        found.setdefault(name, {})[match[2]] = Usage(
            int(used[1]), int(shared[1]) if shared else 0, int(frame[1]), int(frame[2]) + int(frame[3])
        )
    return found


def _demangle(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in text.splitlines()]


def short_name(name: str) -> str:
    """``kernel<float, 4>`` from a demangled signature."""
    name = name.replace("(anonymous namespace)::", "").replace("vareid::", "").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


@functools.cache
def usage() -> dict[str, dict[str, Usage]]:
    """Usage of every kernel of csrc/cuda on every architecture."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        logs = list(pool.map(compile_log, sorted(KERNELS.glob("*.cu"))))
    return {kernel: found for log in logs for kernel, found in parse(log).items()}


def differences(found: dict[str, dict[str, Usage]], budget: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """What takes more than the budget allows, and which kernels it does not know or knows in vain; one line each."""
    lines = [f"{kernel}: is not in the budget" for kernel in found if kernel not in budget]
    lines += [f"{kernel}: is in the budget, but no longer in csrc/cuda" for kernel in budget if kernel not in found]
    for kernel, by_architecture in found.items():
        for architecture, u in by_architecture.items():
            allowed = budget.get(kernel, {}).get(architecture)
            if allowed is None:
                continue
            for what in ("registers", "shared"):
                if getattr(u, what) > allowed[what]:
                    lines.append(f"{kernel} on {architecture}: {what} {getattr(u, what)}, allowed are {allowed[what]}")
    return lines


def read_budget() -> tuple[str, dict[str, dict[str, dict[str, int]]]]:
    """nvcc's version when the budget was written, and the budget."""
    content = json.loads(BUDGET.read_text())
    return content["nvcc"], content["kernels"]


def main() -> None:
    """Prints the differences, or writes the budget."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel_budget", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write tests/kernel_budget.json from what nvcc says now")
    update = parser.parse_args().update
    if missing_reason():
        raise SystemExit(missing_reason())
    if not update:
        print("\n".join(differences(usage(), read_budget()[1])) or "all kernels are within the budget")
        return
    kernels = {
        kernel: {
            a: {k: v for k, v in asdict(u).items() if k in ("registers", "shared")} for a, u in sorted(found.items())
        }
        for kernel, found in sorted(usage().items())
    }
    lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(found)}" for kernel, found in kernels.items())
    partial = BUDGET.with_suffix(".partial")
    partial.write_text(f'{{\n  "nvcc": "{compiler_version()}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    os.replace(partial, BUDGET)


if __name__ == "__main__":
    main()
