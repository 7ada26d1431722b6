"""The scripts of docs/clusters.md: run with stand-ins for the schedulers, to the bytes of one process."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from _vareid_cli import run
from tests.factories import feature_array
from tests.test_documentation import section

PAGE = "docs/clusters.md"
SBATCH = """#!/bin/bash
echo "sbatch $*" >> jobs
for argument; do
  case $argument in
    --array=*) tasks=$(seq $(tr - ' ' <<< "${argument#*=}")) ;;
    --wrap=*) command=${argument#*=} ;;
  esac
done
for SLURM_ARRAY_TASK_ID in ${tasks:-none}; do export SLURM_ARRAY_TASK_ID; bash -c "$command"; done
wc -l < jobs
"""


def blocks(title, language):
    return re.findall(rf"```{language}\n(.*?)```", section(PAGE, title), re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("query.npz", feature=feature_array(40, 6))
    np.savez("gallery.npz", feature=feature_array(150, 6, 1), identity=np.arange(150) % 30 - 1)
    assert run(["rerank", "query.npz", "gallery.npz", "--topk", "100", "--output", "expected.npz", "--quiet"]) == 0
    return tmp_path


def assert_is_whole(folder):
    assert (folder / "best.npz").read_bytes() == (folder / "expected.npz").read_bytes()
    assert len(list(folder.glob("lists-*.npz"))) == len(list(folder.glob("best-*.npz"))) == 8


def test_the_slurm_script(folder):
    """With an sbatch that runs its jobs at once and a program that notes its arguments, which are then run."""
    (folder / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("vareid", '#!/bin/sh\necho "$*" >> calls\n')):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (script,) = blocks("SLURM", "bash")
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], check=True, env=environment, capture_output=True)
    jobs = (folder / "jobs").read_text().splitlines()
    assert [re.findall(r"afterok:(\d+)", job) for job in jobs] == [[], ["1"], ["2"], ["3"]]
    calls = (folder / "calls").read_text().splitlines()
    assert len(calls) == 18
    for call in calls:
        assert run([*shlex.split(call), "--quiet"]) == 0
    assert_is_whole(folder)


def spark():
    def parallelize(values, count):
        assert len(values) == count
        return SimpleNamespace(foreach=lambda task: [task(value) for value in values] and None)

    session = SimpleNamespace(sparkContext=SimpleNamespace(parallelize=parallelize))
    builder = SimpleNamespace(getOrCreate=lambda: session)
    return {"pyspark": {}, "pyspark.sql": {"SparkSession": SimpleNamespace(builder=builder)}}


def ray():
    remote = lambda task: SimpleNamespace(remote=lambda value: lambda: task(value))  # noqa: E731
    return {"ray": {"init": lambda: None, "remote": remote, "get": lambda tasks: [task() for task in tasks]}}


def dask():
    class Client:
        def map(self, task, values, pure):
            return [lambda value=value: task(value) for value in values]

        def gather(self, tasks):
            return [task() for task in tasks]

    return {"dask": {}, "dask.distributed": {"Client": Client}}


@pytest.mark.parametrize(("number", "scheduler"), [(1, spark), (2, ray), (3, dask)])
def test_the_scripts_of_spark_ray_and_dask(folder, monkeypatch, number, scheduler):
    """With a stand-in that has what they use of it, and calls of the program in this process."""
    for name, content in scheduler().items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))

    def call(command, check):
        assert command[0] == "vareid"
        assert check
        assert run(command[1:]) == 0

    monkeypatch.setattr(subprocess, "run", call)
    tasks, *scripts = blocks("Spark, Ray, Dask", "python")
    names = {}
    exec(compile(tasks, PAGE, "exec"), names)
    exec(compile(scripts[number - 1], PAGE, "exec"), names)
    assert_is_whole(folder)
