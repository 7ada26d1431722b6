from __future__ import annotations

import dataclasses
import math
import os
import shlex
import textwrap
from importlib import resources

import pytest
import torch
import yaml

from _vareid_cli import run
from tests.tiny import batch_of, tiny
from vareid_ext.data import SyntheticSettings, build_transform
from vareid_ext.methods import TwoBranch, VaReid
from vareid_ext.training import command_line
from vareid_ext.training.command_line import (
    CommandLineError,
    field_names,
    fields,
    nearest,
    parse,
    recipe_names,
    to_yaml,
)
from vareid_ext.training.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    StageConfig,
)
from vareid_ext.training.schedule import learning_rate

RECIPES = resources.files("vareid_ext.recipes")


def flat(config):
    return dict(fields(config))


def of_recipe(name):
    """The configuration of a recipe, with a folder where it needs one."""
    root = [] if name.startswith("synthetic") else ["--root", "x"]
    return parse(["--recipe", name, *root]).config


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_holds_exactly_what_differs_from_its_base_in_a_few_lines(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    own = dict(command_line.pairs(yaml.safe_load(text)))
    if "stages" in own:
        own["stages"] = [
            StageConfig(**{**stage, "train": tuple(stage["train"])} if "train" in stage else stage)
            for stage in own["stages"]
        ]
    config = of_recipe(name)
    base = Config()
    if "base" in own:
        above = own.pop("base")
        assert "base" not in yaml.safe_load((RECIPES / f"{above}.yaml").read_text())
        base = of_recipe(above)
    if config.method.name != base.method.name:  # another method begins with its own defaults
        base = dataclasses.replace(base, method=type(config.method)())
        assert own.pop("method.name") == config.method.name
    differs = {key: value for key, value in flat(config).items() if key != "data.root" and value != flat(base)[key]}
    assert differs == {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 12


def test_without_arguments_the_synthetic_recipe_runs():
    request = parse([])
    assert request.name == recipe_names()[0] == "synthetic"
    assert request.config.data.kind == "synthetic"
    assert (request.output, request.resume) == (None, False)


@pytest.mark.parametrize(
    ("name", "smoothing", "viewpoint", "regularizer"),
    [
        ("xent", "none", False, False),
        ("lsr", "uniform", False, False),
        ("adaptive", "adaptive", False, False),
        ("adaptive-viewpoint", "adaptive", True, False),
        ("adaptive-regularizer", "adaptive", False, True),
        ("va-reid", "adaptive", True, True),
    ],
)
def test_the_ablation_rows_differ_in_the_loss_only(name, smoothing, viewpoint, regularizer):
    config = parse(["--recipe", f"market1501-{name}", "--root", "x"]).config
    loss = config.method
    assert (loss.smoothing, loss.use_viewpoint, loss.use_regularizer) == (smoothing, viewpoint, regularizer)
    assert (loss.alpha, loss.beta, loss.epsilon) == (0.2, 0.1, 0.1)
    full = parse(["--recipe", "market1501-va-reid", "--root", "x"]).config
    assert dataclasses.replace(config, method=full.method) == full
    # The facts of the authors' logs.
    assert (config.data.height, config.data.width, config.data.pad, config.data.flip, config.data.erasing) == (
        384, 128, 10, 0.5, 0.5,
    )  # fmt: skip
    assert (config.sampler.identities, config.sampler.instances) == (24, 4)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("adam", 3.5e-4, 5e-4)
    assert (config.optimizer.epochs, config.optimizer.milestones) == (241, (50, 100, 160, 200))


def test_local_recipe_differs_in_the_branch_only():
    local = parse(["--recipe", "market1501-va-reid-local", "--root", "x"]).config
    plain = parse(["--recipe", "market1501-va-reid", "--root", "x", "--local"]).config
    assert local == plain
    assert local.method.local


def test_command_line_wins_over_file_and_file_over_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optimizer:\n  epochs: 7\n  lr: 0.5\nmodel:\n  backbone_options: {a: [1, 2]}\n")
    request = parse(["--config", str(path), "--optimizer.lr", "0.25"])
    assert (request.config.optimizer.epochs, request.config.optimizer.lr) == (7, 0.25)
    assert request.config.model.backbone_options == {"a": [1, 2]}
    assert request.config.sampler == parse([]).config.sampler
    assert request.name == "mine"


def test_another_method_begins_with_its_own_settings(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: market1501-va-reid\nmethod: {name: two-branch, triplet_weight: 2.0}\n")
    request = parse(["--config", str(path), "--root", "x"])
    assert (request.config.method.triplet_weight, request.config.method.view_weight_drop) == (2.0, None)
    assert parse(["--method", "two-branch", "--epsilon", "0.2"]).config.method == TwoBranch.Config(epsilon=0.2)
    assert command_line.to_config(request.config.plain()) == request.config


def test_stages_say_what_differs_in_each():
    text = "[{epochs: 3, train: [neck, loss], optimizer: {lr: 0.5}}, {epochs: 4, sampler: {kind: shuffled}}]"
    config = parse(["--stages", text, "--milestones", "[2]"]).config
    first, second = config.resolved_stages
    assert (first.optimizer.epochs, first.optimizer.lr, first.train, first.sampler) == (
        3, 0.5, ("neck", "loss"), config.sampler,
    )  # fmt: skip
    assert (second.optimizer, second.train) == (dataclasses.replace(config.optimizer, epochs=4), None)
    assert second.sampler.kind == "shuffled"
    assert config.epochs == 7
    assert command_line.to_config(config.plain()) == config


@pytest.mark.parametrize("option", ["--epochs=5", "--optimizer.epochs=5"])
def test_epochs_are_refused_where_stages_have_their_own(tmp_path, option):
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{epochs: 2}]\n")
    for arguments, name in (
        (["--recipe=synthetic-pcb-rpp"], "synthetic-pcb-rpp"),
        (["--stages=[{epochs: 2}]"], "synthetic"),
        (["--config", str(path)], "mine"),
    ):
        with pytest.raises(CommandLineError, match=f"^optimizer.epochs: 5 was given; {name} trains in stages, each"):
            parse([*arguments, option])
    with pytest.raises(CommandLineError) as error:
        parse(["--recipe=synthetic-pcb-rpp", option])
    typed = shlex.split(str(error.value))
    stages = typed[typed.index("--stages") + 1]
    recipe = parse(["--recipe=synthetic-pcb-rpp"]).config
    assert parse(["--recipe=synthetic-pcb-rpp", "--stages", stages]).config == recipe
    config = parse(["--recipe=synthetic-pcb-rpp", option, "--stages=[]"]).config
    assert config.epochs == 5
    path.write_text(to_yaml(parse(["--recipe=synthetic-pcb-rpp"]).config))  # names every field, epochs too
    assert parse(["--config", str(path)]).config.epochs == 8 + 2 + 4


def test_a_file_may_name_the_recipe_that_it_differs_from(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: market1501-lsr\noptimizer: {epochs: 7}\n")
    by_option = parse(["--recipe", "market1501-lsr", "--root", "x", "--epochs", "7"]).config
    request = parse(["--config", str(path), "--root", "x"])
    assert (request.config, request.name) == (by_option, "mine")
    assert parse(["--config", str(path), "--recipe", "synthetic"]).config == parse(["--epochs", "7"]).config


def test_the_configuration_of_a_run_names_every_field_and_no_base():
    for name in ("market1501-lsr", "market1501-two-branch"):
        config = parse(["--recipe", name, "--root", "x"]).config
        tree = yaml.safe_load(to_yaml(config))
        assert [key for key, _ in command_line.pairs(tree)] == [key for key, _ in fields(config)]


def test_a_written_configuration_reads_back_equal(tmp_path):
    arguments = ["--recipe", "msmt17-va-reid", "--root", "a b: c", "--spread", "[viewpoint, camera]"]
    config = parse([*arguments, "--clip-norm", "2.5", "--mean", "[0.1, 0.2, 0.3]", "--view-weight-drop", "null"]).config
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]).config == config
    assert config.data.root == "a b: c"
    assert config.sampler.spread == ("viewpoint", "camera")


def test_short_names_dashes_and_truth_values():
    arguments = ["--synthetic-identities", "33", "--skip-bad-images", "--viewpoint-labels=soft", "--local"]
    config = parse([*arguments, "--weights", "w.pth"]).config
    assert config.data.synthetic.identities_train == 33
    assert config.data.skip_bad_images
    assert config.data.viewpoint_labels == "soft"
    assert config.method.local
    assert config.model.weights == "w.pth"
    assert not parse(["--model.input-norm", "False"]).config.model.input_norm
    assert parse(["--clip_norm", "null"]).config.optimizer.clip_norm is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.epochz", "3"], ["optimizer.epochz", "optimizer.epochs"]),
        (["--alpah", "0.1"], ["--alpah", "method.alpha"]),
        (["--learning-rate", "1"], ["mean 'optimizer.lr'"]),
        (["--outptu", "x"], ["--outptu", "output"]),
        (["--recipe", "market1501-va-red"], ["market1501-va-red", "market1501-va-reid"]),
        (["--optimizer.epochs", "many"], ["optimizer.epochs", "many"]),
        (["--optimizer.epochs", "2.5"], ["optimizer.epochs", "2.5"]),
        (["--method.smoothing", "hard"], ["method.smoothing", "adaptive"]),
        (["--skip-bad-images", "perhaps"], ["skip_bad_images"]),
        (["--alpha", "0.5"], ["method.alpha", "0.5", "[0, 0.5)"]),
        (["--lr", "nan"], ["optimizer.lr", "nan"]),
        (["--recipe", "coil20"], ["data.root", "--data.root"]),
        (["--synthetic-identities", "0"], ["identities_train"]),
        (["--lr"], ["--lr", "value"]),
        (["--output", ""], ["--output", "value", "empty"]),
        (["--resume="], ["--resume", "value", "empty"]),
        (["lr=3"], ["lr=3"]),
        (["--config", "no/such/file.yaml"], ["no/such/file.yaml"]),
        (["--resume", "no/such/run"], ["no/such/run"]),
        (["--resume", "x", "--recipe", "coil20"], ["recipe", "--resume"]),
        (["--optimizer.milestones", "[5, 3]"], ["optimizer.milestones"]),
        (["--method", "two-brunch"], ["method.name", "two-brunch", "two-branch"]),
        (["--method", "two-branch", "--alpha", "0.1"], ["method.alpha", "'two-branch'"]),
        (["--stages", "[{epochs: 2, optimizer: {rate: 1}}]"], ["stages[0].optimizer", "rate"]),
        (["--stages", "[{epochs: 2, optimizer: {lr: -1}}]"], ["stages[0]", "optimizer.lr", "-1"]),
        (["--stages", "[{train: [neck]}]"], ["stages[0].epochs: nothing was given; a whole number is needed"]),
        (["--stages", "[{epochs: 1}, {epochs: x}]"], ["stages[1].epochs: 'x' was given; a whole number is needed"]),
        (["--stages", "[{epochs: true}]"], ["stages[0].epochs: True was given; a whole number is needed"]),
        (
            ["--stages", "[{epochs: 2, train: backbone}]"],
            ["stages[0].train: 'backbone' was given; a list of parts of the method is needed, such as [backbone]"],
        ),
        (["--stages", "[{epochs: 2, train: [1]}]"], ["stages[0].train: [1] was given; a list of parts"]),
        (["--stages", "[{epochs: 2, epoch: 3}]"], ["stages[0]: there is no field 'epoch'; did you mean 'epochs'?"]),
        (["--stages", "5"], ["stages: [5] was given; a list is needed, of each stage its epochs, train, optimizer, s"]),
        (["--stages", "[7]"], ["stages: [7] was given; a list is needed"]),
        (["--stages", "[{"], ["stages: '[{' was given; a YAML list is needed"]),
        (["--stages", "[{epochs: 1}, {epochs: 2, train: []}]"], ["stages[1].train: [] was given", "nothing", "null"]),
        (["--stages", "[{epochs: 2, optimizer: null}]"], ["stages[0].optimizer", "None"]),
        (["--stages", "[{epochs: 2, optimizer: {name: lion}}]"], ["stages[0]", "optimizer.name", "lion"]),
        (["--stages", "[{epochs: 2, optimizer: {lr: null}}]"], ["stages[0]", "optimizer.lr", "None"]),
        (["--stages", "[{epochs: 2, optimizer: {lr: fast}}]"], ["stages[0]", "optimizer.lr", "fast"]),
        (["--stages", "[{epochs: 2, optimizer: {lr_factors: 3}}]"], ["stages[0]", "optimizer.lr_factors", "3"]),
        (["--stages", "[{epochs: 2, sampler: {kind: random}}]"], ["stages[0]", "sampler.kind", "random"]),
        (["--stages", "[{epochs: 2, optimizer: {epochs: 5}}]"], ["stages[0].optimizer", "epochs", "stage's own"]),
        (
            ["--stages", "[{epochs: 2, optimizer: {ema_decay: 0.9}}]"],
            ["stages[0].optimizer", "ema_decay", "all stages"],
        ),
        (["--sampler.batch-size", "32"], ["sampler.batch_size", "32", "sampler.kind shuffled", "sampler.identities x"]),
        (
            ["--stages", "[{epochs: 2, sampler: {batch_size: 32}}]"],
            ["sampler.batch_size", "32", "sampler.kind shuffled"],
        ),
        (["--lr-factors", "{backbone: -1}"], ["optimizer.lr_factors", "backbone", "-1"]),
    ],
)
def test_a_request_that_cannot_be_met_is_named(arguments, words, capsys):
    with pytest.raises(CommandLineError) as error:
        parse(arguments)
    for word in words:
        assert word in str(error.value)
    assert run(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith("vareid train: error: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optimizer:\n  epoch: 3\n", ["optimizer.epoch", "optimizer.epochs"]),
        ("optimiser:\n  epochs: 3\n", ["optimiser.epochs", "optimizer.epochs"]),
        ("optimizer: 3\n", ["optimizer", "section"]),
        ("base: market1501-lsd\n", ["faulty.yaml", "base", "market1501-lsd", "market1501-lsr"]),
        ("base: 3\n", ["faulty.yaml", "base", "3"]),
        ("- 1\n", ["list"]),
        ("a: [\n", ["YAML"]),
        ("optimizer:\n  epochs: -1\n", ["optimizer.epochs", "-1"]),
    ],
)
def test_a_faulty_file_is_named_with_its_key(tmp_path, text, words):
    path = tmp_path / "faulty.yaml"
    path.write_text(text)
    with pytest.raises(CommandLineError) as error:
        parse(["--config", str(path)])
    for word in words:
        assert word in str(error.value)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "latin1.yaml"
    path.write_bytes("data:\n  root: caf\u00e9\n".encode("latin1"))
    with pytest.raises(CommandLineError, match=r"latin1\.yaml: not UTF-8"):
        parse(["--config", str(path)])


def test_a_run_folder_with_an_edited_configuration_is_checked_as_any_file(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(Config()).replace("epochs: 60", "epochs: many"))
    with pytest.raises(CommandLineError, match=r"optimizer\.epochs.*many"):
        parse(["--resume", str(tmp_path)])


def test_help_shows_every_field_with_its_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--recipe", "market1501-lsr", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, _ in fields(Config()):
        assert f"--{name} " in text, name
    assert "image height, pixels (type: int, default: 384)" in text
    assert "constant of the uniform smoothing" in text
    assert "people in the training split" in text or "identities_train" in text


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        (DataConfig, {"height": 8}),
        (DataConfig, {"flip": 1.5}),
        (DataConfig, {"pad": -1}),
        (DataConfig, {"std": (0.1, 0.0, 0.1)}),
        (DataConfig, {"kind": "manifest"}),
        (SamplerConfig, {"identities": 0}),
        (SamplerConfig, {"identities": 1, "instances": 1}),
        (SamplerConfig, {"batches_per_epoch": 0}),
        (VaReid.Config, {"alpha": -0.1}),
        (VaReid.Config, {"epsilon": 1.0}),
        (VaReid.Config, {"beta": math.inf}),
        (OptimizerConfig, {"lr": 0.0}),
        (OptimizerConfig, {"ema_decay": 1.0}),
        (OptimizerConfig, {"clip_norm": 0.0}),
        (OptimizerConfig, {"milestones": (0, 3)}),
        (EvaluationConfig, {"k1": 0}),
        (EvaluationConfig, {"lambda_value": 1.1}),
        (RunConfig, {"threads": -1}),
        (RunConfig, {"seed": 2**63}),
        (RunConfig, {"seed": -1}),
        (DataConfig, {"mean": (math.nan, 0.5, 0.5)}),
        (DataConfig, {"mean": (-0.1, 0.5, 0.5)}),
        (DataConfig, {"mean": (123.7, 116.3, 103.5)}),
        (DataConfig, {"std": (58.4, 57.1, 57.4)}),
        (DataConfig, {"std": (math.inf, 0.2, 0.2)}),
        (OptimizerConfig, {"milestones": (3, 10**9)}),
        (SyntheticSettings, {"seed": -(2**63)}),
    ],
)
def test_values_out_of_range_are_errors_that_name_the_field(section, changes):
    with pytest.raises(ValueError, match=next(iter(changes)) if "kind" not in changes else "data.root"):
        section(**changes)


def number_fields(section):
    """Every field of a section, and of its sections, that holds a number: (section, name, kind)."""
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value):
            yield from number_fields(value)
        elif entry.type.split(" ")[0] in ("int", "float"):
            yield section, entry.name, entry.type.split(" ")[0]


@pytest.mark.parametrize(("section", "name", "kind"), list(number_fields(Config())), ids=lambda value: str(value)[:20])
def test_no_number_of_a_configuration_is_unbounded(section, name, kind):
    for value in (10**30, -(10**30), *((math.nan, math.inf, 1e40) if kind == "float" else ())):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(section, **{name: value})


def test_the_pixels_of_a_batch_are_bounded():
    sides = DataConfig(height=4096, width=4096)
    for section, allowed in (("sampler", SamplerConfig(16, 4)), ("evaluation", EvaluationConfig(batch_size=64))):
        small = {"sampler": SamplerConfig(1, 2), "evaluation": EvaluationConfig(batch_size=1)}
        Config(data=sides, **{**small, section: allowed})
        more = dataclasses.replace(allowed, **{"instances" if section == "sampler" else "batch_size": 65})
        with pytest.raises(ValueError, match=section):
            Config(data=sides, **{**small, section: more})


def test_what_is_left_to_the_machine_is_no_more_than_it_has(monkeypatch):
    for cores, processes in ((1, 0), (2, 1), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert DataConfig().processes == processes
        assert DataConfig(workers=5).processes == 5


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optimizer.lr = 1.0  # type: ignore[misc]


def test_multistep_learning_rate_with_warm_up():
    config = OptimizerConfig(lr=1.0, warmup_epochs=5, warmup_start=0.1, milestones=(50, 100), gamma=0.1, epochs=120)
    for epoch, expected in [(0, 0.1), (2.5, 0.55), (5, 1.0), (49.99, 1.0), (50, 0.1), (99.5, 0.1), (100, 0.01)]:
        assert learning_rate(config, epoch) == pytest.approx(expected, rel=1e-12)


def test_cosine_learning_rate_ends_at_its_floor():
    config = OptimizerConfig(lr=2.0, schedule="cosine", cosine_floor=0.25, warmup_epochs=0, epochs=10)
    assert learning_rate(config, 0) == pytest.approx(2.0)
    assert learning_rate(config, 5) == pytest.approx(2.0 * (0.25 + 0.75 / 2))
    assert learning_rate(config, 10) == pytest.approx(0.5)
    warm = dataclasses.replace(config, warmup_epochs=2.0, warmup_start=0.5)
    assert learning_rate(warm, 1) == pytest.approx(0.75 * learning_rate(config, 1))


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("method.alpha", ["method.name", "method.rows"], None),
        ("method.global_heads", ["method.local", "method.global_head"], "method.global_head"),
        ("market1501-qqxx", ["market1501-srb", "market1501-mgn"], None),
        ("market1501-srv", ["dukemtmc-srb", "market1501-srb", "market1501-mgn"], "market1501-srb"),
        ("marked1501-srb", ["dukemtmc-srb", "market1501-srb"], "market1501-srb"),
        ("optimiser.epochs", ["run.epochs", "optimizer.epochs"], "optimizer.epochs"),
        ("xyzzyplugh", field_names(), None),
    ],
)
def test_only_a_name_that_is_near_is_suggested(name, known, meant):
    assert nearest(name, known) == (
        f"; known are {textwrap.shorten(', '.join(known), 1000, placeholder=' ...')}"
        if meant is None
        else f"; did you mean {meant!r}?"
    )


def test_view_weight_falls_at_its_epoch():
    method = tiny(view_weight=1.0, view_weight_late=0.3, view_weight_drop=80)
    weights = []
    for epoch in (0, 79, 80, 200):
        method.at_epoch(epoch)
        weights.append(method(batch_of(torch.rand(4, 3, 64, 32)))["viewpoint"].weight)
    assert weights == [1.0, 1.0, 0.3, 0.3]
    method = tiny(view_weight=0.5)
    method.at_epoch(10_000)
    assert method.loss.view_weight == 0.5


def test_the_evaluation_s_batch_size_is_not_taken_for_the_training_batch():
    with pytest.raises(CommandLineError, match=r"--batch-size: a training batch is --sampler\.identities x"):
        parse(["--batch-size", "32"])
    assert parse(["--evaluation.batch-size", "32"]).config.evaluation.batch_size == 32


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [((124, 116, 104), (0.2, 0.2, 0.2), "mean"), ((0.5, 0.5, 0.5), (58, 57, 57), "std"), ((0.5,), (0.5,) * 3, "mean")],
)
def test_a_normalisation_of_whole_bytes_is_refused_by_the_transform_too(mean, std, name):
    with pytest.raises(ValueError, match=name):
        build_transform(32, 16, train=False, mean=mean, std=std)


def as_file(tmp_path, text):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def as_run(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return ["--resume", str(tmp_path)]


EXPANDING = "\n".join(["a0: &a0 [" + "1, " * 9 + "1]", *(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}1]" for i in range(1, 11))])


@pytest.mark.parametrize("where", [as_file, as_run])
@pytest.mark.parametrize(
    "text",
    [
        "optimizer:\n  lr: 0.1\noptimizer:\n  epochs: 3\n",
        "optimizer:\n  lr: 0.1\n  lr: 0.2\n",
        "optimizer: {lr: 0.1}\noptimizer.lr: 0.2\n",
        "model:\n  backbone_options: {a: 1, 'a': 2}\n",
        "model:\n  backbone_options:\n    " + EXPANDING.replace("\n", "\n    "),
        "model:\n  backbone_options: &a {a: *a}\n",
        "model: &a\n  model: *a\n",
        "run:\n  seed: " + "9" * 5000,
        "run:\n  seed: 0x" + "f" * 5000,
        "model:\n  backbone_options: {a: 0x" + "f" * 5000 + "}\n",
        "optimizer:\n  lr: 2026-01-31\n",
        "2026-01-31: 3\n",
        "model:\n  backbone_options: {a: !!timestamp 2026-01-31}\n",
        "model:\n  backbone_options: {1: 2}\n",
        "model:\n  backbone_options: {? [a] : 2}\n",
        "model:\n  backbone_options: !!binary aaaa\n",
        "model:\n  backbone_options: " + "[" * 3000 + "]" * 3000,
        "model:\n" + "\n".join(" " * n + "a:" for n in range(1, 300)),
        'data:\n  root: "\\Uffffffff"\n',
        "%YAML 1." + "9" * 5000 + "\n---\na: 1\n",
        "data: {root: !!int x}\n",
        "#" * 200_000,
        "data:\n  <<: {flip: 0.1}\n",
        "x" * 50_000 + ": 1\n",
        'optimizer:\n  lr: "\\e[31m"\n',
    ],
    ids=range(25),
)
def test_yaml_that_hides_or_blows_up_what_it_holds_is_an_error_of_one_line(tmp_path, where, text):
    with pytest.raises(CommandLineError) as error:
        parse(where(tmp_path, text))
    assert str(tmp_path) in str(error.value) or "optimizer.lr" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2000


def test_a_base_of_many_letters_is_an_error_of_few(tmp_path):
    (tmp_path / "faulty.yaml").write_text("base: " + "x" * 5000)
    with pytest.raises(CommandLineError, match="base") as error:
        parse(["--config", str(tmp_path / "faulty.yaml")])
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("key", ["<<", "1", "yes", "y" * 101])
def test_a_key_that_is_no_name_is_shown_with_its_line(tmp_path, key):
    with pytest.raises(CommandLineError, match=f"line 2.*{key[:100]}"):
        parse(as_file(tmp_path, f"data:\n  {key}: {{flip: 0.1}}\n"))


def test_a_run_saved_with_an_empty_list_of_parts_trains_all(tmp_path):
    """What earlier versions wrote for a stage that names no parts."""
    stages = "[{epochs: 1, train: [neck]}, {epochs: 2, train: []}]"
    new = parse(["--stages", stages.replace(", train: []", "")]).config
    old = to_yaml(new).replace("train: null", "train: []")
    assert "train: []" in old
    assert parse(as_run(tmp_path, old)).config == new
    assert command_line.to_config(yaml.safe_load(old)) == new
    for arguments in (as_file(tmp_path, old), [*as_run(tmp_path, old), f"--stages={stages}"]):
        with pytest.raises(CommandLineError, match=r"stages\[1\]\.train: \[\] was given, which trains nothing"):
            parse(arguments)


def test_a_value_of_the_command_line_is_checked_as_that_of_a_file():
    for text in ("{a: 1, a: 2}", "&a {a: *a}", "{" + EXPANDING.replace("\n", ", ") + "}"):
        for field in ("model.backbone_options", "data.root", "optimizer.epochs"):
            with pytest.raises(CommandLineError, match=field):
                parse([f"--{field}={text}"])


def test_an_alias_that_stays_small_and_a_date_as_a_name_are_read(tmp_path):
    text = "model: {backbone_options: {a: &a [1, 2], b: *a}}\ndata: {kind: auto, root: 2026-01-31}\n"
    config = parse(as_file(tmp_path, text)).config
    assert config.model.backbone_options == {"a": [1, 2], "b": [1, 2]}
    assert config.data.root == "2026-01-31"
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(["--resume", str(tmp_path)]).config == config


def test_an_error_of_a_file_that_is_no_yaml_is_one_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("optimizer: [3\n")
    with pytest.raises(CommandLineError, match=r"a\.yaml: not a YAML file: .*line 2") as error:
        parse(["--config", str(path)])
    assert "\n" not in str(error.value)
