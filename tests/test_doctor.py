"""The doctor names what is there, and fails when the main job cannot run."""

from __future__ import annotations

import sys
import types

from vareid_ext import _native, doctor


def test_names_backends_versions_and_devices(capsys):
    status = doctor.main([])
    out = capsys.readouterr().out
    for word in ("backend cpu", "backend cuda", "torch", "threads", "processor", "GPU", "scipy (optional)"):
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
