"""Weights of other programs' ResNets, under their own key names, against the network that they are of."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from tests.test_train import start
from vareid_ext.files import weights as weights_file
from vareid_ext.files.pickles import Unread, read_pickle
from vareid_ext.files.weights import load_backbone_weights
from vareid_ext.models import Backbone

TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def network(block, layers) -> nn.Module:
    """A ResNet of torchvision without its head, with weights and statistics of its own."""
    torch.manual_seed(3)
    whole = torchvision.models.ResNet(block, layers)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return nn.Sequential(OrderedDict((name, getattr(whole, name)) for name in TRUNK)).eval()


@pytest.fixture(scope="module")
def resnet18():
    return network(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))


def trunk_with(path, name="resnet18") -> tuple[nn.Module, tuple[str, ...]]:
    torch.manual_seed(4)
    trunk = Backbone(name, last_stride=2).eval().trunk
    return trunk, load_backbone_weights(trunk, str(path))


def prefixed(prefix, state):
    return OrderedDict((prefix + key, value) for key, value in state.items())


def neck(prefix, width, classes=751):
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{prefix}.{name}": torch.ones(width) for name in names}


def fast_reid(state, width=512):
    head = {**neck("heads.bottleneck.0", width), "heads.weight": torch.zeros(751, width)}
    mean = {name: torch.ones(1, 3, 1, 1) for name in ("pixel_mean", "pixel_std")}
    return {
        "model": OrderedDict({**mean, **prefixed("backbone.", state), **head}),
        "optimizer": {"state": {0: {"step": 5, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "scheduler": {"milestones": Counter({40: 1}), "last_epoch": 3},
        "iteration": 12,
    }


def torchreid(state, width=512):
    head = {"classifier.weight": torch.zeros(702, width), "classifier.bias": torch.zeros(702)}
    return {"state_dict": prefixed("module.", {**state, **head}), "epoch": 60, "rank1": np.float32(0.9)}


def torchreid_fc512(state, width=512):
    head = {"fc.0.weight": torch.zeros(512, width), "fc.0.bias": torch.zeros(512), **neck("fc.1", 512)}
    return {**state, **head, "classifier.weight": torch.zeros(702, 512), "classifier.bias": torch.zeros(702)}


def strong_baseline(state, width=512):
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    return {**prefixed("base.", state), **neck("bottleneck", width), "classifier.weight": torch.zeros(751, width)}


def compiled(state, width=512):
    return prefixed("module._orig_mod.", {**state, "fc.weight": torch.zeros(1000, width), "fc.bias": torch.ones(1000)})


LAYOUTS = {
    fast_reid: 7,
    torchreid: 2,
    torchreid_fc512: 8,
    strong_baseline: 5,
    compiled: 2,
}
"""Each layout, and how many entries it has beside the trunk's."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trunk_gives_the_features_of_the_network_whose_weights_it_took(layout, resnet18, images, tmp_path):
    torch.save(layout(resnet18.state_dict()), tmp_path / "w.pth")
    trunk, left_out = trunk_with(tmp_path / "w.pth")
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), resnet18(images), rtol=1e-6, atol=1e-6)
    assert len(left_out) == LAYOUTS[layout]
    assert not [name for name in left_out if "layer" in name]


def test_a_resnet50_of_bottlenecks_too(images, tmp_path):
    reference = network(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3])
    torch.save(strong_baseline(reference.state_dict(), 2048), tmp_path / "w.pth")
    trunk, left_out = trunk_with(tmp_path / "w.pth", "resnet50")
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), reference(images), rtol=1e-5, atol=1e-5)
    assert "classifier.weight" in left_out


class Baseline(nn.Module):
    """A whole network, as reid-strong-baseline has saved it with some versions of its libraries."""

    def __init__(self, base):
        super().__init__()
        self.base, self.bottleneck, self.classifier = base, nn.BatchNorm1d(512), nn.Linear(512, 751, bias=False)
        self.gap = nn.AdaptiveAvgPool2d(1)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("container", [None, "model"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_network_that_was_pickled_is_read_without_its_class(resnet18, images, tmp_path, zipped, container):
    module = Baseline(resnet18)
    content = {container: module} if container else module
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "w.pth").read_bytes()
    trunk, left_out = trunk_with(tmp_path / "w.pth")
    assert b"Baseline" in data
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), resnet18(images), rtol=1e-6, atol=1e-6)
    assert set(left_out) >= {"bottleneck.weight", "classifier.weight"}


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_that_a_file_names_is_run(resnet18, tmp_path):
    content = {"state_dict": resnet18.state_dict(), "optimizer": Evil(tmp_path / "run")}
    torch.save(content, tmp_path / "w.pth")
    trunk_with(tmp_path / "w.pth")
    torch.save(Evil(tmp_path / "run"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"holds a pickled posix.mkdir, not a dictionary of weights"):
        trunk_with(tmp_path / "w.pth")
    torch.save({**resnet18.state_dict(), "conv1.weight": Evil(tmp_path / "run")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"conv1.weight is \[64, 3, 7, 7\] here and a pickled posix.mkdir in the file"):
        trunk_with(tmp_path / "w.pth")
    assert not (tmp_path / "run").exists()


def test_an_object_of_another_class_stands_for_itself_only_where_that_is_asked_for():
    content = pickle.dumps({"a": OrderedDict(x=1), "b": Counter("aab"), "c": [Baseline(nn.ReLU())]}, 2)
    found = read_pickle(io.BytesIO(content), unread=True)
    assert isinstance(found["b"], Unread)
    assert found["b"].name.endswith("Counter")
    assert found["c"][0].name.endswith("Baseline")
    assert set(found["c"][0].state) >= {"_modules", "_parameters"}
    with pytest.raises(ValueError, match="which is not plain data"):
        read_pickle(io.BytesIO(content))


def test_modules_that_hold_each_other_many_times_are_read_once(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2))
    for _ in range(60):
        module = nn.Sequential(module, module)
    torch.save(module, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit the network"):
        trunk_with(tmp_path / "w.pth")


# ---- what does not fit -----------------------------------------------------------------------------------------------


def ibn(state):
    """The first batch norm of a block in two halves, as in fast-reid's IBN."""
    changed = OrderedDict()
    for key, value in state.items():
        part = key.partition("layer1.0.bn1.")[2]
        if not part:
            changed[key] = value
        elif part != "num_batches_tracked":
            changed[f"layer1.0.bn1.BN.{part}"] = value[:32]
            if part in ("weight", "bias"):
                changed[f"layer1.0.bn1.IN.{part}"] = value[32:]
    return changed


def se(state):
    return {**state, "layer1.0.se.fc.0.weight": torch.zeros(4, 64), "layer1.0.se.fc.2.weight": torch.zeros(64, 4)}


def non_local(state):
    return {**state, "NL_2.0.g.weight": torch.zeros(1, 128, 1, 1)}


@pytest.mark.parametrize(
    ("variant", "here", "there"),
    [
        (ibn, r"backbone|layer1.0.bn1.weight is \[64\] here and missing in the file", r"layer1.0.bn1.IN.weight \[32\]"),
        (se, "", r"2 of the file's are missing here: backbone.layer1.0.se.fc.0.weight \[4, 64\]"),
        (non_local, "", r"1 of the file's are missing here: backbone.NL_2.0.g.weight \[1, 128, 1, 1\]"),
    ],
)
def test_a_variant_that_this_backbone_is_not_is_refused_with_both_sides(resnet18, tmp_path, variant, here, there):
    torch.save(fast_reid(variant(resnet18.state_dict())), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth' does not fit the network; ") as error:
        trunk_with(tmp_path / "w.pth")
    assert re.search(here, str(error.value))
    assert re.search(there, str(error.value))
    assert "heads" not in str(error.value)


def test_another_depth_is_refused_with_both_shapes(resnet18, tmp_path):
    torch.save(torchreid(resnet18.state_dict()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"module.layer1.0.conv1.weight is \[64, 64, 1, 1\] here and \[64, 64, 3, 3\]"):
        trunk_with(tmp_path / "w.pth", "resnet50")
    torch.save(network(torchvision.models.resnet.BasicBlock, [2, 2, 2, 3]).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"12 of the file's are missing here: layer4.2.conv1.weight"):
        trunk_with(tmp_path / "w.pth")


# ---- how often it is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_run_reads_its_file_once_and_lets_go_of_it(tmp_path, monkeypatch, capsys, suffix):
    from safetensors.torch import save_file

    trunk = Backbone("resnet10t", options={"channels": [8, 8, 8, 8], "stem_width": 8}).trunk
    content = {f"base.{key}": value.contiguous() for key, value in trunk.state_dict().items()}
    content["classifier.weight"] = torch.zeros(751, 8)
    path = tmp_path / f"w{suffix}"
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    read, read_file = [], weights_file._read_file
    monkeypatch.setattr(weights_file, "_read_file", lambda name: read.append(name) or read_file(name))
    assert start(tmp_path / "run", "--epochs=0", "--baselines=false", f"--weights={path}") == 0
    assert read == [str(path)]
    assert weights_file._read_version.cache_info().currsize == 0
    assert "1 entries of" in (text := capsys.readouterr().out)
    assert "left out: classifier.weight" in text
    path.write_bytes(path.read_bytes()[:500])  # another file since
    assert start(tmp_path / "other", "--epochs=0", f"--weights={path}") == 2
    assert "cannot be read" in capsys.readouterr().err
