"""What README and docs show is run: every command and every block of Python, on small data."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import _vareid_cli
from benchmarks import plot
from tests.test_train import SMALL
from vareid_ext import nearest_neighbors, pairwise_distance
from vareid_ext.data import SyntheticSettings, synthetic_data, write_manifest
from vareid_ext.files.features import read_features

ROOT = Path(__file__).resolve().parents[1]
TINY = [*SMALL, "--epochs=1", "--batches-per-epoch=2", "--baselines=false", "--device=cpu", "--workers=0"]
NETWORK = ["--model.backbone=resnet10t", "--pretrained=false"]


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        Block(str(page.relative_to(ROOT)), language, text)
        for page in pages
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


def python_in(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


# Commands that are run elsewhere: the file that does, and what stands there.
ELSEWHERE = {
    "pip install .": (".ci/run", "pip install -q '.[test,dev]'"),
    "VAREID_CUDA=PYPI pip install .": ("tests/test_build.py", 'configure(tmp_path, "PYPI"'),
    "bash .ci/gpu OUT": (".ci/run", 'bash .ci/gpu "$scratch/gpu" --dry-run'),
    "bash .ci/gpu OUT --wheels wheels": ("tests/test_gpu_report.py", '"--wheels", "EMPTY", "--dry-run"'),
    "bash benchmarks/measure.sh": ("tests/test_documentation.py", "def test_the_script_that_measures"),
    "python -m benchmarks.plot": ("tests/test_documentation.py", "def test_the_tables_and_the_plot"),
    "python -m benchmarks.market_ablation pack": ("tests/test_market_ablation.py", 'main(["pack"'),
    "python -m benchmarks.market_ablation train": ("tests/test_market_ablation.py", 'command = ["train"'),
    "python -m vareid_ext.train --method contrastive": ("tests/test_documentation.py", "--method=contrastive"),
    "vareid ablate --output": ("tests/test_ablate.py", "def test_nine_rows_of_seven_runs"),
    "torchrun --nproc-per-node": ("tests/test_several_processes.py", 'torchrun("--max-restarts", "1"'),
    "vareid views": ("tests/test_views.py", 'run(["views"'),
    "torchrun --nproc-per-node 2 search.py": ("tests/test_processes_retrieval.py", "def test_the_documented_search"),
    **dict.fromkeys(
        ("n=8", "lists=$(sbatch", "merged=$(sbatch", "best=$(sbatch", "sbatch"),
        ("tests/test_clusters.py", "def test_the_slurm_script"),
    ),
    "pip download": ("tests/test_gpu_report.py", "--wheels"),  # needs the network
}
# What a command gets beside its own arguments, by its beginning; the first that fits counts.
ADDED = {
    "python -m vareid_ext.train --help": [],
    "python -m vareid_ext.train --resume": ["--batches-per-epoch=2", "--baselines=false"],
    "python -m vareid_ext.train --recipe": [*TINY, *NETWORK],
    "python -m vareid_ext.train": TINY,
    "vareid train --recipe market1501-va-reid --root data/market1501 --backbone resnet18": ["--quiet"],
    "vareid extract": ["--quiet"],
    "vareid export": ["--quiet"],
    "vareid index": ["--quiet"],
    "vareid search": ["--quiet"],
    "vareid neighbors": ["--quiet"],
    "vareid rerank --merge": ["--quiet"],
    "vareid rerank --neighbors": ["--quiet", "--num-query=18", "--topk=10"],
    "vareid rerank": ["--quiet", "--topk=10"],
    "vareid evaluate": ["--quiet"],
    "vareid label-viewpoints my/manifest.csv --train": ["--quiet", "--epochs=1"],
    "vareid label-viewpoints": ["--quiet", "--min-confidence=0"],
    "vareid compare": ["--quiet", "--resamples=50"],
    "vareid report": ["--quiet", "--resamples=50", "--queries=3"],
    "vareid doctor": [],
    "vareid methods": [],
    "python -m benchmarks.bench_ranking --quick": ["--rounds=1"],
    "python -m benchmarks.retrieval --size": ["--rounds=1", "--size", "40", "160", "32"],
}
# Blocks of Python, by page and beginning: the names that they expect, or the file that runs them and what stands there.
_LOSS_AND_METHOD = ("tests/test_documentation.py", "def test_a_new_loss_and_a_new_method_are")
PYTHON: dict[tuple[str, str], Any] = {
    **{
        ("docs/clusters.md", beginning): ("tests/test_clusters.py", "def test_the_scripts_of_spark_ray_and_dask")
        for beginning in ("import subprocess", "from pyspark", "import ray", "from dask")
    },
    ("docs/extending.md", '"""Supervised contrastive loss'): _LOSS_AND_METHOD,
    ("docs/extending.md", '"""Cross entropy and the'): _LOSS_AND_METHOD,
    ("docs/extending.md", '"""Files named'): ("tests/test_data_readers.py", "def documented_reader"),
    ("docs/extending.md", "from dataclasses"): lambda: {"joints_of": lambda paths: [np.ones((14, 3))] * len(paths)},
    ("docs/extending.md", '"""``vareid count'): ("tests/test_cli.py", "def test_a_new_command_is_one_file"),
    ("docs/extending.md", '"""Average query expansion'): (
        "tests/test_evaluate_features.py",
        "`QueryExpansion` of docs",
    ),
    ("docs/getting-started.md", "import vareid_ext"): dict,
    ("docs/getting-started.md", "from vareid_ext import ViewpointAwareLoss"): lambda: {**features(), **batch()},
    ("docs/your-model.md", "import vareid_ext"): ("tests/test_trained.py", "def test_the_documented_uses_of_a_model"),
    ("docs/your-model.md", "import numpy"): ("tests/test_export.py", "def test_the_documented_use_of_an_onnx_file"),
    ("docs/your-own-data.md", "from vareid_ext import evaluate_features"): lambda: features(),
    ("docs/your-own-data.md", "from vareid_ext import GalleryIndex"): lambda: features(),
    ("docs/your-own-data.md", "import numpy as np\nimport torch.distributed"): (
        "tests/test_processes_retrieval.py",
        "def test_the_documented_search",
    ),
    ("docs/your-own-data.md", "import faiss"): ("tests/test_neighbor_lists.py", "another index"),
    ("docs/your-own-data.md", "from vareid_ext import evaluate_ranking"): lambda: features(),
    ("docs/your-own-data.md", "from vareid_ext import pairwise_distance, verify_features"): lambda: features(),
}


def batch() -> dict[str, Any]:
    return {"feature": torch.randn(4, 2048), "identity": torch.arange(4), "viewpoint": torch.tensor([0, 1, 2, -1])}


def features() -> dict[str, Any]:
    """Query and gallery of the working folder, under the names that the pages use."""
    sides = {side: read_features(f"{side}.npz", side, columns={"clothes": None}) for side in ("query", "gallery")}
    names: dict[str, Any] = {}
    for side, found in sides.items():
        labels = {"identity": found.identity, "camera": found.camera, **found.columns}
        names |= {side: found.feature, **{f"{side}_{label}": values for label, values in labels.items()}}
    return names


@pytest.fixture(scope="module")
def folder(trained_run, tmp_path_factory) -> Path:
    """What a reader of the pages would have: features, photographs, data sets."""
    folder = tmp_path_factory.mktemp("reader")
    for side in ("query", "gallery"):
        arrays = {**np.load(trained_run / f"{side}.npz")}
        np.savez(folder / f"{side}.npz", **arrays, column_clothes=np.arange(len(arrays["identity"])) % 5)
    feature = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    squared, row = nearest_neighbors(feature, k=30)  # what another index would have found
    farthest = pairwise_distance(feature, metric="sqeuclidean").amax(1)
    for name, array in (("row", row), ("squared", squared), ("farthest", farthest)):
        np.save(folder / f"{name}.npy", array.numpy())
    size = {"identities_train": 4, "identities_test": 3, "images_per_identity": 6, "distractors": 1}
    data = synthetic_data(SyntheticSettings(**size, height=32, width=16))
    write_manifest(data, folder / "my")
    shutil.copytree(folder / "my", folder / "coil20")
    for side, images in (("a", data.train), ("b", data.gallery), ("c", data.query)):
        for number, identity in enumerate(images.identity.tolist()):
            place = folder / "people" / f"{side}{identity}"
            place.mkdir(parents=True, exist_ok=True)
            images.load(number).save(place / f"{number}.png")
    people = (folder / "my" / "manifest.csv").read_text()
    for file, views in (("cars", ("front", "front_left", "left:0.5 rear:0.5")), ("angles", ("0", "90.5", "359"))):
        places = itertools.cycle(views)
        text = re.sub(r"(?<=,)(front|side|back)\w*(?=,)", lambda _, of=places: next(of), people)
        (folder / "my" / f"{file}.csv").write_text(text)
    for place in ("photos", "photos-schp"):
        (folder / place).mkdir()
    for name, image in zip("abc", range(3), strict=True):
        data.query.load(image).save(folder / "photos" / f"{name}.jpg")
        Image.new("L", (16, 32), 5).save(folder / "photos-schp" / f"{name}.png")
    (folder / "openpose").mkdir()
    (folder / "market-openpose").mkdir()

    def write_pose(path: Path, x: int) -> None:
        points = np.array([[5, 9, 1]] * 5 + [[x, 9, 1]] * 3 + [[5, 18, 1]] * 3 + [[x, 18, 1]] * 7)
        points[[10, 13]] = 15, 30, 1  # the feet, near the edge of the image
        path.write_text(json.dumps({"people": [{"pose_keypoints_2d": points.ravel().tolist()}]}))

    for name, x in zip("abc", (9, 1, 5), strict=True):
        write_pose(folder / "openpose" / f"{name}.json", x)
    (folder / "labelled.csv").write_text("path,viewpoint\na.jpg,front\nb.jpg,back\nc.jpg,side\n")
    viewpoints = {}
    for split, images in zip(("bounding_box_train", "query", "bounding_box_test"), data.splits.values(), strict=True):
        for place in (folder / "Market-1501" / split, folder / "parsing" / split, folder / "schp" / split):
            place.mkdir(parents=True)
        offset = 0 if split == "bounding_box_train" else 1000
        for i, (identity, camera) in enumerate(zip(images.identity, images.camera, strict=True)):
            stem = f"{identity + offset + 1:04d}_c{camera % 6 + 1}s1_{i:06d}_00"
            images.load(i).save(folder / "Market-1501" / split / f"{stem}.jpg")
            for maps in ("parsing", "schp"):
                Image.new("L", (16, 32), i % 5).save(folder / maps / split / f"{stem}.png")
            write_pose(folder / "market-openpose" / f"{stem}.json", (9, 5, 1)[i % 3])
            viewpoints[f"{stem}.jpg"] = (i % 3, ("front", "side", "back")[i % 3])
    vehicles = folder / "VehicleID_V1.0"
    (vehicles / "train_test_split").mkdir(parents=True)
    cargo = itertools.product(("train", "query", "gallery"), (1, 2, 6, 7), (3, 4))
    for number, (split, camera, identity) in enumerate(cargo):
        name = f"CARGO/{split}/Cam{camera}/Cam{camera}_day_{identity}_{number}.jpg"
        for path in (folder / name, vehicles / "image" / f"{number:07d}.jpg"):
            path.parent.mkdir(parents=True, exist_ok=True)
            data.train.load(number).save(path)
    for name, numbers in (("train_list", range(8)), ("test_list_800", range(8, 24))):
        lines = "".join(f"{number:07d} {number // 4}\n" for number in numbers)
        (vehicles / "train_test_split" / f"{name}.txt").write_text(lines)
    (folder / "market_image_map_direction.pkl").write_bytes(pickle.dumps(viewpoints))
    return folder


def matching(text: str, table: dict[str, Any]) -> Any:
    return next((value for beginning, value in table.items() if text.startswith(beginning)), None)


def check_stands(place: tuple[str, str]) -> None:
    file, words = place
    assert words in (ROOT / file).read_text()


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run one command of a page in this process."""
    added = matching(command, ADDED)
    assert added is not None, f"neither ADDED nor ELSEWHERE knows this command: {command}"
    words = shlex.split(command) + added
    if words[0] == "vareid":
        return _vareid_cli.run(words[1:])
    assert words[:2] == ["python", "-m"], command
    if words[2].startswith("vareid_ext."):
        return _vareid_cli.run([words[2].removeprefix("vareid_ext."), *words[3:]])
    monkeypatch.setattr(sys, "argv", words[2:])
    return importlib.import_module(words[2]).main() or 0


def run_commands(text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in filter(None, re.split(r"\s*(?:&&|\n|#.*\n)\s*", text.replace("\\\n", " "))):
        if elsewhere := matching(command, ELSEWHERE):
            check_stands(elsewhere)
            continue
        status = run_command(command, monkeypatch)
        assert status == 0, f"{command}: {capsys.readouterr().err}"
        if output := re.search(r"--output (\S+)", command):
            assert Path(output[1]).exists(), command


@pytest.mark.parametrize("page", sorted({block.page for block in blocks()}))
def test_every_block_of_a_page_runs_in_turn(page, folder, trained_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    if page == "docs/your-model.md":  # which begins where a training has ended
        pytest.importorskip("onnxscript")
        for name in ("mine", "yours"):
            shutil.copytree(trained_run, tmp_path / "runs" / name)
    for block in blocks():
        if block.page != page or block.language == "text":
            continue
        if block.language == "bash":
            run_commands(block.text, monkeypatch, capsys)
            continue
        assert block.language == "python", f"bash, python, or text, which is not run, but: {block}"
        how = next((v for (p, first), v in PYTHON.items() if p == page and block.text.startswith(first)), None)
        assert how is not None, f"PYTHON does not know this block: {block}"
        if callable(how):
            exec(compile(block.text, page, "exec"), how())
        else:
            check_stands(how)


@pytest.mark.parametrize("command", ["vareid fly", "python -m vareid_ext.fly", "ls"])
def test_a_command_that_is_in_no_table_fails(command, monkeypatch, capsys):
    with pytest.raises(AssertionError, match="neither ADDED nor ELSEWHERE"):
        run_commands(f"{command}\n", monkeypatch, capsys)


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


# ---- extending -----------------------------------------------------------------------------------------------------


def supervised_contrastive() -> Callable[..., torch.Tensor]:
    names: dict[str, Any] = {}
    exec(python_in(section("docs/extending.md", "A loss")), names)
    return names["supervised_contrastive"]


def test_the_documented_loss_is_that_of_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(7, 5, generator=generator, requires_grad=True)
    identity = torch.tensor([0, 1, 0, 2, 1, 0, 3])  # 2 and 3 have no positive
    x = feature.detach().double()
    x = x / x.norm(dim=1, keepdim=True)
    per_image = []
    for i in range(7):
        others = [j for j in range(7) if j != i]
        total = sum(float(torch.exp(x[i] @ x[j] / 0.1)) for j in others)
        positives = [j for j in others if identity[j] == identity[i]]
        if positives:
            per_image.append(np.mean([-np.log(float(torch.exp(x[i] @ x[j] / 0.1)) / total) for j in positives]))
    loss = supervised_contrastive()(feature, identity)
    assert float(loss) == pytest.approx(np.mean(per_image), rel=1e-5)
    loss.backward()
    assert torch.isfinite(feature.grad).all()
    assert float(supervised_contrastive()(feature.detach(), torch.arange(7))) == 0


def test_a_new_loss_and_a_new_method_are_a_file_each_and_one_line(tmp_path):
    """In a copy of the package, as in a branch: what docs/extending.md shows is trained by the program."""
    package = tmp_path / "vareid_ext"
    shutil.copytree(ROOT / "vareid_ext", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_vareid_cli.py", tmp_path)
    method = section("docs/extending.md", "A method")
    (package / "losses" / "supervised_contrastive.py").write_text(python_in(section("docs/extending.md", "A loss")))
    (package / "methods" / "contrastive.py").write_text(python_in(method))
    registry = package / "methods" / "__init__.py"
    line, before = re.search(r'`("contrastive": .*?,)`', method)[1], registry.read_text()
    registry.write_text(
        before.replace('        "va-reid": "VaReid",\n', f'        "va-reid": "VaReid",\n        {line}\n')
    )
    assert len(registry.read_text().splitlines()) == len(before.splitlines()) + 1
    # An editable installation would be found before the copy.
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'ScikitBuildRedirectingFinder']\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import _vareid_cli, vareid_ext\n"
        f"assert vareid_ext.__file__.startswith({str(tmp_path)!r})\n"
        "_vareid_cli.main()\n"
    )
    arguments = [*TINY, "--method=contrastive", "--method.weight=2", f"--output={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), "train", *arguments], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in steps if "loss" in entry]
    assert len(losses) == 2
    assert all(set(loss) == {"total", "identity", "contrastive"} for loss in losses)
    assert "contrastive" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["trained"]["mAP"] > 0
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000


# ---- performance ---------------------------------------------------------------------------------------------------


def stored(root: Path, name: str, cases: list[dict[str, Any]]) -> None:
    environment = {"device": "a CPU", "cpu_capability": "X", "threads": 2, "torch": "2", "load_average": [0.1, 0, 0]}
    report = {"benchmark": name, "environment": environment, "cases": cases}
    (root / "docs" / "performance" / f"{name}.json").write_text(json.dumps(report))


def case_of(row: plot.Row, ours: float, theirs: float) -> dict[str, Any]:
    seconds = {row.contender: ours, row.against: theirs}
    return {
        "case": f"{row.case}X", "contenders": {name: {"median_s": value} for name, value in seconds.items()},
        "mebibytes_beyond": {row.contender: 20.0, row.against: 8192.0},
    }  # fmt: skip


def test_the_tables_and_the_plot_are_made_of_stored_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    for page in ("README.md", "docs/performance.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    for name in ("performance", "images"):
        (tmp_path / "docs" / name).mkdir()
    with pytest.raises(SystemExit):
        plot.main()
    assert "holds no results" in capsys.readouterr().err
    row = plot.ROWS[0]
    stored(tmp_path, row.file, [case_of(row, 0.5, 50.0)])
    plot.main()
    assert f"| {row.what} | 500 ms, 20 MiB | {row.named}: 50 s, 8.0 GiB |" in (tmp_path / "README.md").read_text()
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert f"| {row.what} | {row.named} | 500 ms | 50 s | **0.01** | 20 MiB | 8.0 GiB |" in page
    assert "load average 0.1" in page
    with Image.open(tmp_path / "docs" / "images" / "performance.png") as image:
        assert image.width > 500
    plot.main()  # again: the marks are still there
    assert (tmp_path / "docs" / "performance.md").read_text() == page


def test_the_pages_show_what_is_stored():
    numbers = plot.read_numbers(ROOT / "docs" / "performance")
    assert plot.short_table(numbers) in (ROOT / "README.md").read_text()
    assert plot.table(numbers, {}).rstrip() in (ROOT / "docs" / "performance.md").read_text()


def test_the_script_that_measures_writes_what_the_plot_reads(tmp_path):
    """With a Python that only notes its arguments."""
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / "measure.sh"), "q.npz", "g.npz"], check=True,
        env=os.environ | {"PYTHON": str(python)},
    )  # fmt: skip
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls.pop() == "-m benchmarks.plot"
    outputs = set()
    for call in calls:
        module, output = re.match(r"-m benchmarks\.(\w+) --output docs/performance/(\w+)\.json ", call).groups()
        assert (ROOT / "benchmarks" / f"{module}.py").exists()
        outputs.add(output)
    assert {row.file for row in plot.ROWS} <= outputs
