"""The program ``vareid``: its help, its errors, its results as JSON, how it ends; and how a command is added."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vareid_ext.cli
from _vareid_cli import COMMANDS, run, run_program
from tests.test_feature_files import images
from tests.test_train import SMALL
from vareid_ext.cli import evaluate, rerank, train
from vareid_ext.cli.common import raised_signals
from vareid_ext.methods import METHODS
from vareid_ext.training import console
from vareid_ext.training.console import TrainingBar

ROOT = Path(__file__).resolve().parent.parent


def command(name, folder):
    """The arguments of a short call of a command."""
    np.savez(folder / "x.npz", **images(0, 20))
    files = [str(folder / "x.npz")] * 2
    return {
        "doctor": ["vareid_ext.doctor"],
        "evaluate": ["vareid_ext.evaluate", "--features", *files, "--output", str(folder / "metrics.json")],
        "rerank": ["vareid_ext.rerank", *files, "--output", str(folder / "result.npy")],
        "train": ["vareid_ext.train", *SMALL, "--output", str(folder / "run")],
    }[name]


def call(arguments, encoding="utf-8", **streams):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": encoding}
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run([sys.executable, "-m", *arguments], env=environment, timeout=300, check=False, **streams)


@pytest.fixture
def unread():
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Puts the handler back that run_program, which ends a process, leaves."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# ---- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_of_itself(capsys, name):
    assert run([name, "--help"]) == 0
    options, _, examples = capsys.readouterr().out.partition("examples:")
    assert "--debug" in options
    assert f"  vareid {name}" in examples


def test_help_names_every_command_and_imports_no_torch():
    code = "import sys, _vareid_cli; _vareid_cli.run(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(re.search(rf"^  {name} ", done.stdout, re.MULTILINE) for name in COMMANDS)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("name", ["evaluate", "rerank"])
def test_a_command_does_not_import_what_others_need(tmp_path, name):
    code = f"import sys, _vareid_cli; _vareid_cli.run({[name, *command(name, tmp_path)[1:]]}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert f"vareid_ext.cli.{name}" in loaded
    assert not loaded & {
        "torchvision",
        "timm",
        "matplotlib",
        "jinja2",
        "jsonargparse",
        "vareid_ext.data",
        "vareid_ext.training",
    }


def test_the_spellings_of_a_command_are_one(tmp_path):
    module, *arguments = command("evaluate", tmp_path)
    spellings = ([module], ["vareid_ext", "evaluate"], ["_vareid_cli", "evaluate"])
    texts = {call([*names, *arguments, "--quiet"], stdout=subprocess.PIPE).stdout for names in spellings}
    assert len(texts) == 1
    assert b"original" in texts.pop()


def test_the_version_is_printed(capsys):
    assert run(["--version"]) == 0
    assert vareid_ext.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "there is no command 'evalute'; did you mean evaluate?"),
        (["xyzzy"], "there is no command 'xyzzy'; known are train, "),
        ([], "a command is needed; known are train, "),
        (["extract", "x", "--rate=3"], "there is no option --rate; known are "),
        (["evaluate", "--featurs", "q.npz"], "there is no option --featurs; did you mean --features?"),
        (["rerank", "q.npz", "g.npz", "--lamda-value=0.1"], "there is no option --lamda-value; did you mean --lambda-"),
        (["rerank", "q.npz", "g.npz"], "required: --output"),
        (["rerank", "q.npz", "g.npz", "--output", "r.npy", "--k1", "many"], "--k1: invalid int value: 'many'"),
        (["train", "--recip", "synthetic"], "'recipe'"),
    ],
)
def test_a_request_that_is_wrong_is_one_line_that_says_how(capsys, arguments, message):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_file_name_may_look_like_an_option(capsys):
    assert run(["rerank", "--output", "r.npy", "--", "--q.npz", "--g.npz"]) == 2
    assert "--q.npz: does not exist" in capsys.readouterr().err


# ---- results and errors ------------------------------------------------------------------------------------------


def test_a_training_gives_its_metrics_as_json(tmp_path, capsys):
    arguments = ["train", *command("train", tmp_path)[1:], "--epochs=1", "--baselines=false", "--json"]
    assert run([*arguments, "--quiet"]) == 0
    found = capsys.readouterr()
    values = json.loads(found.out)
    assert values == {"run": str(tmp_path / "run"), **json.loads((tmp_path / "run" / "metrics.json").read_text())}
    assert not found.err
    assert run(["train", "--resume", str(tmp_path / "run"), "--json"]) == 0
    found = capsys.readouterr()
    assert json.loads(found.out)["trained"] == values["trained"]
    assert "checkpoints are in" in found.err


@pytest.mark.parametrize("name", ["doctor", "evaluate", "rerank"])
def test_json_is_all_that_standard_output_holds(tmp_path, capsys, name):
    arguments = [name, *command(name, tmp_path)[1:], "--json"]
    assert run(arguments) == 0
    found = capsys.readouterr()
    assert run([*arguments, "--quiet"]) == 0
    quiet = capsys.readouterr()
    values = json.loads(found.out)
    assert values == json.loads(quiet.out)
    assert found.err
    assert not quiet.err
    if name == "evaluate":
        assert values == json.loads((tmp_path / "metrics.json").read_text())
    if name == "rerank":
        assert (values["queries"], values["gallery"]) == np.load(values["output"]).shape


def test_what_a_command_prints_on_its_way_is_not_in_the_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "results_table", lambda results: print("on its way") or "the table")
    assert run(["evaluate", *command("evaluate", tmp_path)[1:], "--json"]) == 0
    captured = capsys.readouterr()
    assert "on its way" in captured.err
    json.loads(captured.out)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("k1: 0 was given"), 2, "vareid rerank: error: k1: 0 was given"),
        (MemoryError("too much"), 2, "vareid rerank: error: too much"),
        (torch.OutOfMemoryError("no memory\nand much more"), 2, "vareid rerank: error: no memory"),
        (KeyError("x"), 1, "vareid rerank: defect: KeyError: 'x' at "),
    ],
)
def test_a_traceback_is_shown_with_debug_only(tmp_path, capsys, monkeypatch, error, status, said):
    def fails(*features, **options):
        raise error

    monkeypatch.setattr(rerank, "k_reciprocal_rerank", fails)
    arguments = ["rerank", *command("rerank", tmp_path)[1:]]
    assert run(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    assert line == said or "test_cli.py:" in line
    assert run([*arguments, "--debug"]) == status
    captured = capsys.readouterr().err
    assert captured.startswith("Traceback")
    assert "in fails" in captured
    assert captured.splitlines()[-1] == line


def test_a_new_command_is_one_file_and_one_line(tmp_path, capsys, monkeypatch):
    """The file and the line that docs/extending.md shows."""
    section = (ROOT / "docs" / "extending.md").read_text().partition("## A command\n")[2].partition("\n## ")[0]
    source = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    (tmp_path / "count.py").write_text(source)
    monkeypatch.setattr(vareid_ext.cli, "__path__", [*vareid_ext.cli.__path__, str(tmp_path)])
    monkeypatch.setitem(COMMANDS, "count", re.search(r'`"count": "(.*?)",`', section)[1])
    np.savez(tmp_path / "x.npz", feature=np.eye(3, dtype=np.float32), camera=[4, 1, 4])
    try:
        assert run(["--help"]) == 0
        assert "  count " in capsys.readouterr().out
        assert run(["count", str(tmp_path / "x.npz")]) == 0
        assert capsys.readouterr().out == "camera 1: 1 images\ncamera 4: 2 images\n"
        assert run(["count", str(tmp_path / "x.npz"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"1": 1, "4": 2}
        assert run(["count", str(tmp_path / "y.npz")]) == 2
        assert "y.npz: does not exist" in capsys.readouterr().err
    finally:
        sys.modules.pop("vareid_ext.cli.count", None)


# ---- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doctor", "evaluate", "rerank", "train"])
def test_a_command_whose_reader_has_gone_ends_as_by_sigpipe(tmp_path, unread, name):
    quiet = ["--quiet"] if name in ("evaluate", "rerank") else []
    done = call(command(name, tmp_path) + quiet, stdout=unread, stderr=subprocess.PIPE)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b"Error" not in done.stderr
    assert b"rror:" not in done.stderr
    assert b"roken" not in done.stderr
    # What was asked for as a file is there all the same.
    assert (tmp_path / "metrics.json").exists() == (name == "evaluate")
    assert (tmp_path / "result.npy").exists() == (name == "rerank")


def test_errors_and_bars_that_nobody_reads_end_it_as_well(tmp_path, unread):
    done = call(command("train", tmp_path), stdout=unread, stderr=unread)
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("name", ["evaluate", "train", "--help"])
def test_output_that_cannot_be_written_is_one_line_and_status_2(tmp_path, name):
    arguments = ["_vareid_cli", name] if name == "--help" else command(name, tmp_path)
    with open("/dev/full", "wb") as full:
        done = call(arguments, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "standard output" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_table_reaches_a_terminal_of_few_letters(tmp_path):
    done = call(command("evaluate", tmp_path), "ascii", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert b"original" in done.stdout


def test_a_training_whose_reader_goes_can_be_resumed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", *command("train", tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert any(b"epoch 1 " in line and b"mAP" in line for line in process.stdout)
    process.stdout.close()
    assert process.wait(timeout=300) == 128 + signal.SIGPIPE
    done = call(["vareid_ext.train", "--resume", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_bar_that_nobody_reads_does_not_stop_the_training(monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr(console, "_INTERVAL_OF_FILE", 0)
    with open(write, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        bar = TrainingBar(3, 0)
        os.close(read)
        with pytest.raises(BrokenPipeError):
            print("it is broken", file=stderr)
        for _ in range(3):
            bar.update(8, {"total": 1.0}, 0.1)
        bar.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # what is left in the buffer goes there


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_its_status_and_one_line(tmp_path, number):
    code = f"""
import sys, time, _vareid_cli
from vareid_ext.cli import evaluate

def wait(*features, **options):
    print("running", file=sys.stderr, flush=True)
    time.sleep(60)

evaluate.rank_features = wait
_vareid_cli.main({["evaluate", *command("evaluate", tmp_path)[1:]]})
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stderr.readline() == "running\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert err == f"vareid evaluate: interrupted; {tmp_path / 'metrics.json'} is as it was\n"


def test_ignored_signals_stay_ignored(tmp_path):
    """As those of a shell's background, and under nohup."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with raised_signals():
            for number in before:
                signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interruptible():
    """What a process does with Ctrl-C where nobody has told it to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("name", "imported"),
    [*((name, "_interrupt") for name in ("doctor", "evaluate", "rerank", "train")), ("train", "data")],
)
@pytest.mark.parametrize("spelling", ["vareid_ext.{}", "vareid_ext {}", "_vareid_cli {}"])
def test_ctrl_c_while_a_command_imports_is_quiet(tmp_path, name, imported, spelling):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", *spelling.format(name).split(), *command(name, tmp_path)[1:]],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible,
    )  # fmt: skip
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == f"vareid_ext.{imported}":
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=300) == 128 + signal.SIGINT
    assert "Traceback" not in rest


def test_a_bar_that_a_signal_ends_within_does_not_keep_the_process():
    """What a signal handler raises may leave tqdm's lock held; nobody may wait for it at the end."""
    code = """
import time
from tqdm import tqdm
tqdm.monitor_interval = 0.1
import vareid_ext.cli.common
with tqdm(total=1):
    tqdm.get_lock().acquire()
    time.sleep(1)
raise SystemExit(7)
"""
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 7


def test_ctrl_c_where_a_command_does_not_expect_it_is_one_line(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(interrupted)
    assert end.value.code == 128 + signal.SIGINT
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(train, "parse", interrupted)
    assert train.main([]) == 128 + signal.SIGINT


def test_a_program_that_imports_the_package_keeps_its_ctrl_c(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import vareid_ext")
    (tmp_path / "other" / "__main__.py").write_text(
        "import signal\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, "-m", "other"], cwd=tmp_path, check=True, preexec_fn=interruptible)


# ---- methods -----------------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_what_the_methods_say(tmp_path, capsys):
    page = tmp_path / "methods.md"
    for content in page_text(), re.sub(r"\| \[.*\n", "", page_text()):
        page.write_text(content)
        assert run(["methods", "--page", str(page)]) == 0
        assert page.read_text() == page_text(), "vareid methods --page docs/methods.md"
    capsys.readouterr()
    assert run(["methods", "--json", "--quiet"]) == 0
    lines = json.loads(capsys.readouterr().out)["methods"]
    assert {line["method"] for line in lines} == set(METHODS)
    for line in lines:
        assert f'"{line["method"]}"' in (ROOT / line["file"]).read_text()
        for scores in (line["published"], line["measured"]):
            for dataset in scores:
                recipe = (
                    dataset if line["name"] == "va-reid" and dataset == "synthetic" else f"{dataset}-{line['name']}"
                )
                assert (ROOT / "vareid_ext" / "recipes" / f"{recipe}.yaml").is_file()


def page_text():
    return (ROOT / "docs" / "methods.md").read_text()


def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- methods: end -->\n")
    assert run(["methods", "--page", str(page)]) == 2
    assert "has no lines <!-- methods: begin" in capsys.readouterr().err
    assert page.read_text() == "<!-- methods: end -->\n"
