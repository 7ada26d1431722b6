"""The build's choices about CUDA, by configuring the project (nothing is compiled but CMake's own test program)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None or shutil.which("c++") is None,
    reason="needs cmake, pybind11 and a C++ compiler",
)


def nvcc():
    for place in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if place and Path(place).exists():
            return place
    return None


def configure(tmp_path, mode, **environment):
    import pybind11

    environment = {**os.environ, "CUDAARCHS": "80-real", **environment}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build")]
    command += [] if mode is None else [f"-DVAREID_CUDA={mode}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def broken_nvcc(tmp_path):
    path = tmp_path / "nvcc"
    path.write_text('#!/bin/sh\ntouch "$(dirname "$0")/asked"\necho \'unsupported GNU version\' >&2\nexit 1\n')
    path.chmod(0o755)
    return str(path)


def test_auto_degrades_with_one_message_when_nvcc_cannot_compile(tmp_path, broken_nvcc):
    result = configure(tmp_path, "AUTO", CUDACXX=broken_nvcc)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("CUDA kernels OFF: no nvcc was found that compiles a test program") == 1


def test_on_stops_with_a_clear_error(tmp_path, broken_nvcc):
    result = configure(tmp_path, "ON", CUDACXX=broken_nvcc)
    assert result.returncode != 0
    assert "VAREID_CUDA=ON, but no nvcc was found" in re.sub(r"\s+", " ", result.stderr)


def test_an_earlier_failure_is_not_remembered(tmp_path, broken_nvcc):
    """After a repair (another CUDAHOSTCXX, say) the same build folder works: the compiler is asked again."""
    assert configure(tmp_path, "AUTO", CUDACXX=broken_nvcc).returncode == 0
    Path(broken_nvcc).with_name("asked").unlink()
    configure(tmp_path, "AUTO", CUDACXX=broken_nvcc)
    assert Path(broken_nvcc).with_name("asked").exists()


def test_the_environment_sets_the_default(tmp_path, broken_nvcc):
    result = configure(tmp_path, None, CUDACXX=broken_nvcc, VAREID_CUDA="OFF")
    assert result.returncode == 0, result.stderr
    assert "CUDA" not in result.stdout


def test_an_empty_choice_is_no_choice(tmp_path, broken_nvcc):
    result = configure(tmp_path, "", CUDACXX=broken_nvcc, VAREID_CUDA="")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels OFF" in result.stdout


def test_off_does_not_look_for_nvcc(tmp_path, broken_nvcc):
    result = configure(tmp_path, "OFF", CUDACXX=broken_nvcc)
    assert result.returncode == 0, result.stderr
    assert "CUDA" not in result.stdout


def test_another_word_is_refused(tmp_path):
    result = configure(tmp_path, "YES")
    assert result.returncode != 0
    assert "VAREID_CUDA is 'YES'; allowed are AUTO, ON and OFF" in re.sub(r"\s+", " ", result.stderr)


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_nvcc_is_found_off_path_and_the_architectures_are_respected(tmp_path):
    home = str(Path(nvcc()).resolve().parents[1])
    if not Path(home, "bin", "nvcc").exists():
        home = "/usr/local/cuda"
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    if shutil.which("cmake", path=path) is None or shutil.which("c++", path=path) is None:
        pytest.skip("cmake or c++ lies beside nvcc")
    result = configure(tmp_path, "ON", PATH=path, CUDA_HOME=home, CUDAARCHS="75-real")
    assert result.returncode == 0, result.stderr
    assert re.search(r"CUDA kernels ON \(.*architectures 75-real\)", result.stdout)
