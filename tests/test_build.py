"""The build's choices about CUDA, by configuring the project (nothing is compiled but CMake's own test program)."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPI = "VAREID_CUDA=PYPI pip install ."

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None or shutil.which("c++") is None,
    reason="needs cmake, pybind11 and a C++ compiler",
)


def configure(tmp_path, mode, *options, python=sys.executable, **environment):
    import pybind11

    environment = {**os.environ, "CUDAARCHS": "80-real", **environment}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), *options]
    command += [] if mode is None else [f"-DVAREID_CUDA={mode}"]
    if not any("VAREID_DRIVER_FILE" in option for option in options):
        command += [f"-DVAREID_DRIVER_FILE={tmp_path / 'no driver'}"]
    command += [f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    result.stderr = re.sub(r"\s+", " ", result.stderr)  # CMake breaks the lines of an error
    return result


@pytest.fixture
def python(tmp_path):
    """An environment's Python and its folder for packages; nothing is installed in it."""
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    return str(tmp_path / "venv" / "bin" / "python"), packages


def install_torch(packages, cuda):
    (packages / "torch").mkdir()
    (packages / "torch" / "__init__.py").write_text("raise RuntimeError('the build imports no torch')")
    (packages / "torch" / "version.py").write_text(f"cuda = {cuda!r}")


def install_driver(tmp_path, version):
    path = tmp_path / "driver"
    path.write_text(
        f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sat Aug 19 01:15:15 UTC 2023\nGCC 12.3.0\n"
    )
    return f"-DVAREID_DRIVER_FILE={path}"


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
    assert "VAREID_CUDA=ON" in result.stderr
    assert PYPI in result.stderr


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
    assert "VAREID_CUDA is 'YES'" in result.stderr


@pytest.mark.parametrize(
    ("cuda", "driver", "told"),
    [("13.0", None, True), (None, "580.65.06", True), (None, None, False)],
    ids=["a torch for CUDA", "a driver", "neither"],
)
def test_without_nvcc_auto_prints_the_command_where_cuda_could_be(tmp_path, broken_nvcc, python, cuda, driver, told):
    executable, packages = python
    install_torch(packages, cuda)
    options = [install_driver(tmp_path, driver)] if driver else []
    result = configure(tmp_path, "AUTO", *options, python=executable, CUDACXX=broken_nvcc)
    assert result.returncode == 0, result.stderr
    assert (PYPI in result.stdout) == told


@pytest.mark.parametrize("mode", ["AUTO", "ON"])
@pytest.mark.parametrize(
    ("driver", "gpus", "told"),
    [
        ("550.54.14", "9.0", "update driver 550.54.14 to 580 or newer"),
        ("580.65.06", "9.0\n7.0", "compute capability 7.0"),
    ],
)
def test_an_nvcc_of_pypi_that_could_not_serve_this_machine_is_not_all_that_is_told(
    tmp_path, broken_nvcc, mode, driver, gpus, told
):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    result = configure(tmp_path, mode, install_driver(tmp_path, driver), CUDACXX=broken_nvcc, PATH=path)
    (line,) = [line for line in [*result.stdout.splitlines(), result.stderr] if "CUDACXX=/path/to/nvcc" in line]
    assert told in line
    assert (PYPI in line) == (driver == "550.54.14")  # once the driver is newer


def test_without_the_packages_pypi_says_what_to_type(tmp_path, python):
    result = configure(tmp_path, "pypi", python=python[0])
    assert result.returncode != 0
    assert "pip install 'cuda-toolkit[nvcc,cccl]" in result.stderr


PARTS = ("bin/nvcc", "nvvm/bin/cicc", "include/crt/host_config.h", "include/cuda_runtime.h", "lib/libcudart_static.a")


@pytest.mark.parametrize("missing", [*PARTS[1:], None])
def test_an_nvcc_of_pypi_that_cannot_work_is_told(tmp_path, python, missing):
    executable, packages = python
    for part in PARTS:
        path = packages / "nvidia" / "cu13" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        if part != missing:
            path.touch(mode=0o755)
    result = configure(tmp_path, "PYPI", python=executable)
    assert result.returncode != 0
    if missing:
        assert f"lacks {missing}; type: pip install --force-reinstall 'cuda-toolkit[nvcc,cccl]==13.*'" in result.stderr
    else:  # whole, but compiles nothing: PyPI once more is no help
        assert "set CUDAHOSTCXX" in result.stderr
        assert "pip install" not in result.stderr


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        (["cuda_toolkit-13.0.3", "nvidia_cuda_runtime-13.0.96"], "13.0.3"),
        (["nvidia_cuda_runtime-13.0.96"], "13.0.*"),
        (["cuda_toolkit-12.9.1"], "13.*"),
    ],
)
def test_the_repair_keeps_the_toolkit_that_is_there(tmp_path, python, installed, named):
    for distribution in installed:
        name, version = distribution.split("-")
        folder = python[1] / f"{distribution}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: {version}\n")
    result = configure(tmp_path, "PYPI", python=python[0])
    assert f"pip install 'cuda-toolkit[nvcc,cccl]=={named}'" in result.stderr


@pytest.fixture(scope="module")
def toolkit():
    """The folder of the CUDA toolkit of this machine."""
    found = shutil.which("nvcc")
    for home in (Path("/usr/local/cuda"), *([Path(found).resolve().parents[1]] if found else [])):
        if (home / "bin" / "nvcc").exists() and (home / "nvvm").exists():
            return home
    pytest.skip("needs nvcc")


def test_pypi_takes_the_nvcc_among_the_python_packages(tmp_path, python, toolkit):
    executable, packages = python
    (packages / "nvidia" / "cu13").mkdir(parents=True)
    for ours, theirs in (("bin", "bin"), ("nvvm", "nvvm"), ("include", "include"), ("lib", "lib64")):
        (packages / "nvidia" / "cu13" / ours).symlink_to(toolkit / theirs)
    result = configure(tmp_path, "PYPI", python=executable, CUDACXX="/an/nvcc/that/is/not/there")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"CUDA kernels ON \({packages}/nvidia/cu13/bin/nvcc .*architectures 80-real\)", result.stdout)


def test_nvcc_is_found_off_path_and_the_architectures_are_respected(tmp_path, toolkit):
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    if shutil.which("cmake", path=path) is None or shutil.which("c++", path=path) is None:
        pytest.skip("cmake or c++ lies beside nvcc")
    result = configure(tmp_path, "ON", PATH=path, CUDA_HOME=str(toolkit), CUDAARCHS="75-real;80")
    assert result.returncode == 0, result.stderr
    assert re.search(r"CUDA kernels ON \(.*architectures 75-real;80\)", result.stdout)


@pytest.mark.parametrize("mode", ["AUTO", "ON"])
@pytest.mark.parametrize(
    ("given", "wrong"),
    [("80-real;12-real", "12-real"), ("80a-real", "80a-real"), ("90-real;", ""), ("90,80", "90,80"), ("90;all", "all")],
)
def test_an_architecture_that_nvcc_does_not_know_is_refused(tmp_path, toolkit, mode, given, wrong):
    result = configure(tmp_path, mode, CUDACXX=str(toolkit / "bin" / "nvcc"), CUDAARCHS=given)
    assert result.returncode != 0
    assert f"CUDAARCHS: '{given}' was given, of which this nvcc does not take '{wrong}'; allowed are" in result.stderr
    assert "no nvcc" not in result.stdout + result.stderr


def test_an_architecture_with_its_own_features_is_taken(tmp_path, toolkit):
    result = configure(tmp_path, "ON", CUDACXX=str(toolkit / "bin" / "nvcc"), CUDAARCHS="80-virtual;90a-real")
    assert result.returncode == 0, result.stderr
    assert "architectures 80-virtual;90a-real)" in result.stdout


def test_each_build_in_a_folder_decides_its_architectures_anew(tmp_path, toolkit):
    header = tmp_path / "gpu.h"
    environment = {"CUDACXX": str(toolkit / "bin" / "nvcc"), "CUDAFLAGS": f"-include {header}"}
    for given, gpu, architectures in [
        ("80-real", (9, 0), "80-real"),
        ("90-real", (8, 0), "90-real"),
        ("", (9, 0), "90-real"),
        ("", (8, 0), "80-real"),  # another machine over the same folder
        ("", None, "all-major"),
    ]:
        write_gpu(header, gpu)
        result = configure(tmp_path, "ON", CUDAARCHS=given, **environment)
        assert result.returncode == 0, result.stderr
        assert f"architectures {architectures})" in result.stdout
        header.unlink()


def write_gpu(header, gpu):
    """A GPU that CMake's own test program is told of by macros."""
    if gpu is None:
        header.write_text("#include <cuda_runtime.h>\n#define cudaGetDeviceCount(n) (*(n) = 0, cudaErrorNoDevice)\n")
    else:
        header.write_text(
            "#include <cuda_runtime.h>\n#define cudaGetDeviceCount(n) (*(n) = 1, cudaSuccess)\n"
            f"#define cudaGetDeviceProperties(p, n) ((p)->major = {gpu[0]}, (p)->minor = {gpu[1]}, cudaSuccess)\n"
        )


@pytest.mark.parametrize(("gpu", "architectures"), [((9, 0), "90-real"), ((1, 2), "all-major"), ((99, 0), "all-major")])
def test_without_a_choice_the_visible_gpu_decides(tmp_path, python, toolkit, gpu, architectures):
    header = tmp_path / "gpu.h"
    write_gpu(header, gpu)
    environment = {"CUDACXX": str(toolkit / "bin" / "nvcc"), "CUDAARCHS": "", "CUDAFLAGS": f"-include {header}"}
    result = configure(tmp_path, "ON", python=python[0], **environment)
    assert result.returncode == 0, result.stderr
    assert f"architectures {architectures})" in result.stdout
    assert (PYPI in result.stdout) == (gpu == (99, 0))  # newer than this nvcc
    assert ("install a toolkit of CUDA 12" in result.stdout) == (gpu == (1, 2))  # older than it


@pytest.mark.parametrize(("driver", "torch", "told"), [("418.1", "13.0", "418.1"), ("999.1", "99.1", PYPI)])
def test_a_driver_too_old_and_a_torch_too_new_for_nvcc_are_told(tmp_path, python, toolkit, driver, torch, told):
    executable, packages = python
    install_torch(packages, torch)
    option = install_driver(tmp_path, driver)
    result = configure(tmp_path, "ON", option, python=executable, CUDACXX=str(toolkit / "bin" / "nvcc"))
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "vareid_ext: " in line and "CUDA kernels" not in line]
    assert len(lines) == 1
    assert told in lines[0]


@pytest.mark.parametrize(
    ("mode", "needed"), [("PYPI", True), ("pypi", True), ("AUTO", False), ("OFF", False), ("", False)]
)
def test_only_a_build_by_the_nvcc_of_pypi_downloads_one(monkeypatch, mode, needed):
    build = pytest.importorskip("scikit_build_core.build")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VAREID_CUDA", mode)
    required = build.get_requires_for_build_wheel()
    assert any(requirement.startswith("cuda-toolkit[") for requirement in required) == needed


def test_the_matrix_of_versions_lists_its_names_when_asked_for_another():
    matrix = ROOT / ".ci" / "matrix"
    if not matrix.exists():
        pytest.skip("needs the repository")
    result = subprocess.run([matrix, "a-name-it-has-not"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    for name in ("oldest", "torch-2.11", "python-3.11", "newest", "wheel"):
        assert re.search(rf"^ *{name} ", result.stderr, re.M)
