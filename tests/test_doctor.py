"""The doctor names what is there, and fails when the main job cannot run."""

from __future__ import annotations

import sys
import types

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


@pytest.mark.parametrize(
    ("module", "visible", "driver", "cuda", "nvcc", "said"),
    [
        (None, True, True, "13.0", False, "type in the source folder: pip install ."),
        (BUILT, True, True, "13.0", False, "they can run"),
        (CPU_ONLY, True, True, "13.0", False, PYPI),
        (CPU_ONLY, True, True, "13.0", True, "type in the source folder: pip install ."),
        (UNFIT, True, True, "13.0", False, "sm_120"),
        (UNFIT, True, True, "13.0", False, PYPI),
        (BUILT, False, True, None, False, "pip install --force-reinstall torch"),
        (BUILT, False, True, "13.0", False, "13.0 does not run on this driver"),
        (CPU_ONLY, False, False, "13.0", False, "no NVIDIA driver"),
    ],
)
def test_each_case_of_cuda_is_told_with_what_to_type(monkeypatch, tmp_path, module, visible, driver, cuda, nvcc, said):
    monkeypatch.setattr(doctor, "GPU_DRIVERS", (tmp_path if driver else tmp_path / "none",))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvcc" if nvcc else None)
    monkeypatch.setattr(doctor._native, "loaded", lambda: module is not None)
    monkeypatch.setattr(doctor._native, "module", lambda: module)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert said in doctor._cuda_advice()
