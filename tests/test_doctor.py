"""The doctor names what is there, and fails when the main job cannot run."""

from __future__ import annotations

import sys
import types
from typing import NamedTuple

import pytest
import torch

from vareid_ext import _native
from vareid_ext.cli import doctor


def test_names_backends_versions_and_devices(capsys):
    status = doctor.main([])
    out = capsys.readouterr().out
    for word in ("backend cpu", "backend cuda", "torch", "threads", "processor", "GPU", "psutil (optional)"):
        assert word in out
    assert (status == 0) == ("training can run here" in out)
    if _native.loaded():
        assert "compiled module" in out
        assert "products of 8 bits" in out


def test_a_missing_package_is_a_problem_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy", "a_package_nobody_has"))
    assert doctor.main([]) == 1
    captured = capsys.readouterr()
    assert "problem: a_package_nobody_has does not import" in captured.err
    assert "training cannot run here" in captured.out


def test_a_missing_optional_package_is_none(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy",))
    monkeypatch.setattr(doctor, "OPTIONAL", {"a_package_nobody_has": "a test"})
    assert doctor.main([]) == 0
    assert "not usable; needed for a test" in capsys.readouterr().out


def test_a_package_whose_distribution_has_another_name_is_reported(monkeypatch, capsys):
    """As CuPy is: the module ``cupy`` comes from ``cupy-cuda13x``."""
    module = types.ModuleType("a_module_without_a_distribution")
    module.__version__ = "12.3"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(doctor, "REQUIRED", ("numpy",))
    monkeypatch.setattr(doctor, "OPTIONAL", {module.__name__: "a test"})
    assert doctor.main([]) == 0
    assert "a_module_without_a_distribution (optional)  12.3" in capsys.readouterr().out


def probe(reason):
    return types.SimpleNamespace(with_cuda=True, cuda_unusable_reason=lambda device: reason)


BUILT, UNFIT, CPU_ONLY = probe(""), probe("sm_120 is not in this build"), types.SimpleNamespace(with_cuda=False)
PYPI = "VAREID_CUDA=PYPI pip install ."
ON = "type in the source folder: VAREID_CUDA=ON pip install ."
CUDA_12 = "install a toolkit of CUDA 12 and type: CUDACXX=/path/to/nvcc VAREID_CUDA=ON pip install ."


class Machine(NamedTuple):
    """What the advice depends on: by default an H100 with what it needs but for an nvcc."""

    module: object = CPU_ONLY
    gpus: tuple[tuple[int, int], ...] = ((9, 0),)
    driver: str | None = "580.65.06"
    windows: bool = False
    torch_cuda: str | None = "13.0"
    nvcc: int | None = None
    visible_devices: str | None = None


@pytest.fixture
def advice(monkeypatch, tmp_path):
    def on(machine):
        driver, nvcc, windows = tmp_path / "driver", tmp_path / "nvcc", tmp_path / "libcuda.so.1"
        if machine.driver:
            driver.write_text(
                f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {machine.driver}  Sat Aug 19 2023\nGCC 12\n"
            )
        if machine.windows:
            windows.touch()
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {machine.nvcc}.4, V{machine.nvcc}.4.131'\n")
        nvcc.chmod(0o755)
        monkeypatch.setattr(doctor, "GPU_DRIVERS", (driver, windows))
        monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: str(nvcc) if machine.nvcc else None)
        monkeypatch.setattr(doctor._native, "loaded", lambda: machine.module is not None)
        monkeypatch.setattr(doctor._native, "module", lambda: machine.module)
        monkeypatch.setattr(torch.version, "cuda", machine.torch_cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(machine.gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(machine.gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.gpus[index])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if machine.visible_devices is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", machine.visible_devices)
        return doctor._cuda_advice()

    return on


V100 = {"gpus": ((9, 0), (7, 0)), "torch_cuda": "12.6"}
OLD_DRIVER = {"driver": "550.54.14", "torch_cuda": "12.4"}


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(None), "type in the source folder: pip install ."),
        (Machine(BUILT), "they can run"),
        (Machine(), f"type in the source folder: {PYPI}"),
        (Machine(driver=None, windows=True), PYPI),
        (Machine(UNFIT), f"sm_120 is not in this build; type in the source folder: {PYPI}"),
        (Machine(nvcc=13), ON),  # and not AUTO, which an nvcc that compiles nothing would send back here
        (Machine(UNFIT, nvcc=13), ON),
        (Machine(nvcc=12, **V100), ON),
        (Machine(nvcc=12, **OLD_DRIVER), ON),
        (Machine(gpus=(), torch_cuda=None), "a CPU build; type: pip install --force-reinstall torch"),
        (Machine(gpus=(), torch_cuda=None, driver="550.54.14"), "update it to 580 or newer"),
        (
            Machine(gpus=(), driver="550.54.14"),
            "13.0; driver 550.54.14 does not run CUDA 13; update it to 580 or newer",
        ),
        (Machine(gpus=()), "a container needs --gpus all"),
        (Machine(gpus=(), visible_devices=""), "CUDA_VISIBLE_DEVICES is ''; type: unset CUDA_VISIBLE_DEVICES"),
        (Machine(gpus=(), driver=None), "no NVIDIA driver"),
    ],
)
def test_each_case_of_cuda_is_told_with_what_to_type(advice, machine, said):
    assert said in advice(machine)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (Machine(**OLD_DRIVER), "driver 550.54.14 does not run CUDA 13; update it to 580 or newer"),
        (Machine(UNFIT, **OLD_DRIVER), "driver 550.54.14 does not run CUDA 13; update it to 580 or newer"),
        (Machine(nvcc=13, **OLD_DRIVER), "driver 550.54.14 does not run CUDA 13; update it to 580 or newer"),
        (Machine(**V100), "CUDA 13 does not know sm_70"),
        (Machine(UNFIT, **V100), "CUDA 13 does not know sm_70"),
        (Machine(nvcc=13, **V100), "CUDA 13 does not know sm_70"),
    ],
)
def test_where_cuda_13_cannot_run_nothing_that_builds_for_it_is_advised(advice, machine, reason):
    told = advice(machine)
    assert reason in told
    assert CUDA_12 in told
    assert PYPI not in told
    assert ON not in told


def test_a_driver_too_old_for_cuda_12_is_sent_to_no_toolkit_of_it(advice):
    told = advice(Machine(driver="470.57.02", torch_cuda="11.8"))
    assert "update it to 580 or newer" in told
    assert "CUDACXX" not in told


@pytest.mark.parametrize("machine", [Machine(gpus=()), Machine(gpus=(), visible_devices="")])
def test_a_driver_that_is_new_enough_is_not_blamed(advice, machine):
    assert "update" not in advice(machine)


@pytest.mark.parametrize("variable", ["CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_looked_for_where_the_build_looks(variable, monkeypatch, tmp_path):
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 31.4, V31.4.131'\n")
    nvcc.chmod(0o755)
    path = f"{nvcc.parent}:/bin" if variable == "PATH" else "/bin"
    monkeypatch.setenv("PATH", path)
    if variable != "PATH":
        monkeypatch.setenv(variable, str(nvcc if variable == "CUDACXX" else tmp_path))
    assert doctor._nvcc_cuda() == 31
