"""The compiled module: which one is taken, which is refused, and what runs in its place."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest
import torch

from vareid_ext import (
    _native,
    _version,
    angular_center_regularizer,
    backends,
    pairwise_distance,
    reference_backend,
)

ROOT = Path(__file__).resolve().parents[1]
LOSS = """
import torch, vareid_ext
print(vareid_ext.backends()["cpu"])
print(vareid_ext.angular_center_regularizer(torch.ones(2, 3), torch.ones(2, 2, 3)).item())
"""


def run(code, tmp_path=None, **environment):
    """Run code in a fresh interpreter, with tmp_path (if any) before every other place for modules."""
    paths = [str(tmp_path)] if tmp_path else []
    if tmp_path:  # also before where an editable install points
        code = "import sys\nsys.meta_path.sort(key=lambda finder: 'PathFinder' not in str(finder))\n" + code
    paths += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines(), result.stderr


def shadow(tmp_path, text):
    (tmp_path / "_vareid_native.py").write_text(text)
    return tmp_path


def test_a_stale_module_is_refused_in_one_sentence(tmp_path):
    text = f"version = {_version.__version__!r}\ninterface = {_version.NATIVE_INTERFACE + 1}\n"
    out, err = run(LOSS, shadow(tmp_path, text))
    assert "stale" in out[0]
    assert f"interface {_version.NATIVE_INTERFACE + 1}" in out[0]
    assert float(out[1]) == 0.0
    assert err.count("RuntimeWarning") == 1


def test_a_module_that_does_not_load_says_why(tmp_path):
    out, err = run(LOSS, shadow(tmp_path, "raise ImportError('libmissing.so: cannot open')"))
    assert "libmissing.so" in out[0]
    assert float(out[1]) == 0.0
    assert err.count("RuntimeWarning") == 1


def test_a_missing_module_leaves_everything_working_with_one_notice(tmp_path):
    text = "raise ModuleNotFoundError('No module named _vareid_native', name='_vareid_native')"
    out, err = run(
        LOSS + "vareid_ext.angular_center_regularizer(torch.ones(2, 3), torch.ones(2, 2, 3))", shadow(tmp_path, text)
    )
    assert "pip install" in out[0]
    assert float(out[1]) == 0.0
    assert err.count("RuntimeWarning") == 1


def test_the_environment_forces_the_reference_quietly():
    out, err = run(LOSS, VAREID_BACKEND="reference")
    assert "asked for" in out[0]
    assert "Warning" not in err


def test_an_unknown_choice_is_an_error():
    environment = {**os.environ, "VAREID_BACKEND": "fast"}
    result = subprocess.run(
        [sys.executable, "-c", "import vareid_ext"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode != 0
    assert "VAREID_BACKEND: 'fast' was given; allowed are 'auto' and 'reference'" in result.stderr


def test_reference_backend_covers_its_block_only():
    before = backends()["cpu"]
    with reference_backend():
        assert "asked for" in backends()["cpu"]
        with reference_backend():
            pass
        assert _native.reference_forced()
    assert backends()["cpu"] == before


def test_reference_backend_reaches_other_threads():
    """The backward pass on a GPU runs in a thread of autograd's."""
    states = []
    with reference_backend():
        thread = threading.Thread(target=lambda: states.append(backends()["cpu"]))
        thread.start()
        thread.join()
    assert "asked for" in states[0]


@pytest.mark.skipif(_native.backends()["cpu"] != "native", reason="needs the compiled module")
def test_the_module_says_what_it_is():
    module = _native.module()
    assert (module.version, module.interface) == (_version.__version__, _version.NATIVE_INTERFACE)
    assert isinstance(module.with_cuda, bool)
    if module.with_cuda and not torch.cuda.is_available():
        assert "CUDA" in module.cuda_unusable_reason(0)


@pytest.mark.skipif(_native.backends()["cpu"] != "native", reason="needs the compiled module")
def test_the_binding_checks_what_it_is_given():
    W, U = torch.ones(2, 3), torch.ones(2, 2, 3)
    outputs = [torch.empty(()), torch.empty(2, 2), torch.empty(2), torch.empty(2, 2)]
    with pytest.raises(ValueError, match="viewpoint_centers: must have the dtype of identity_centers"):
        _native.launch("angular_center_forward", W, U.double(), None, *outputs, on=W)
    outputs[1] = torch.empty(3, 2)
    with pytest.raises(ValueError, match=r"cosine: shape \[3, 2\], expected \[2, 2\]"):
        _native.launch("angular_center_forward", W, U, None, *outputs, on=W)
    with pytest.raises(TypeError):
        _native.module().angular_center_forward(W, U, None, *outputs, (1, 0, 0))


class OnFirstGpu(torch.Tensor):
    """A tensor that says it lies on the first GPU of a machine."""

    device = property(lambda self: torch.device("cuda", 0))


class OnSecondGpu(torch.Tensor):
    """A tensor that says it lies on the second GPU of a machine."""

    device = property(lambda self: torch.device("cuda", 1))


@pytest.fixture
def mixed_gpus(monkeypatch):
    """A machine whose first GPU runs the kernels and whose second one does not; the devices asked about."""
    asked = []

    def probe(device):
        asked.append(device)
        return "" if device == 0 else "no kernel image is available"

    monkeypatch.setattr(_native, "_module", types.SimpleNamespace(with_cuda=True, cuda_unusable_reason=probe))
    monkeypatch.setattr(_native, "_missing_reason", "")
    monkeypatch.setattr(_native, "_environment_reference", False)
    monkeypatch.setattr(_native, "_cuda_reasons", {})
    monkeypatch.setattr(_native, "_warned", set())
    return asked


def test_each_gpu_is_asked_once_and_only_the_unusable_one_is_told(mixed_gpus):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.available("cuda:0")
        assert _native.available(torch.device("cuda"))  # the current one
        assert backends()["cuda"] == "native"
    with pytest.warns(RuntimeWarning, match="plain PyTorch runs on cuda:1: no kernel image") as told:
        assert [_native.available("cuda:1") for _ in range(2)] == [False, False]
    assert len(told) == 1
    assert sorted(mixed_gpus) == [0, 1]


def test_an_op_runs_the_reference_on_the_gpu_that_cannot_run_its_kernel(mixed_gpus):
    op = _native.with_fallback(lambda x: "kernel", lambda x: "reference")
    assert op(torch.ones(1).as_subclass(OnFirstGpu)) == "kernel"
    with pytest.warns(RuntimeWarning, match="cuda:1"):
        assert op(torch.ones(1).as_subclass(OnSecondGpu)) == "reference"


def test_an_op_runs_the_reference_where_its_kernel_does_not_cover_the_input():
    op = _native.with_fallback(lambda x: NotImplemented, lambda x: "reference")
    assert op(torch.ones(1)) == "reference"


def test_the_probe_refuses_a_device_that_does_not_exist():
    if not _native.loaded() or not _native.module().with_cuda:
        pytest.skip("needs the CUDA build")
    for device in (-1, 10**6):
        assert "CUDA" in _native.module().cuda_unusable_reason(device)


def test_works_on_a_meta_device_without_running():
    loss = angular_center_regularizer(torch.empty(2, 3, device="meta"), torch.empty(2, 2, 3, device="meta"))
    assert loss.shape == ()
    assert loss.device.type == "meta"


@pytest.mark.skipif(not _native.loaded(), reason="needs the compiled module")
def test_the_type_stub_names_what_the_module_has():
    stub = ast.parse((ROOT / "python" / "_vareid_native.pyi").read_text())
    functions = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    values = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    module = _native.module()
    public = {name for name in dir(module) if not name.startswith("_")}
    only_with_cuda = {"cuda_unusable_reason", "pairwise_distance_tiled"}
    assert public == (functions | values) - (set() if module.with_cuda else only_with_cuda)


def _memory_flags(address):
    """What Linux says of the piece of memory that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return None


def test_large_results_lie_on_large_pages():
    if not _native.available("cpu") or _memory_flags(id(0)) is None:
        pytest.skip("no native kernels, or no such memory maps")
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no large pages")
    x = torch.arange(3000.0)[:, None]
    large = pairwise_distance(x, x.clone(), metric="sqeuclidean")
    middle = large.data_ptr() + large.nbytes // 2
    assert "hg" in _memory_flags(middle)  # what madvise(MADV_HUGEPAGE) leaves
    assert torch.equal(large, (x - x.T) ** 2)
