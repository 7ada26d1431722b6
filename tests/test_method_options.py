"""What several methods have in common beside their base class."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tests.test_pose_methods import SMALL, pose_batch
from tests.tiny import batch_of, method_of
from vareid_ext import angular_center_regularizer, viewpoint_aware_cross_entropy
from vareid_ext.methods import METHODS, TrainingClasses
from vareid_ext.methods.viewpoint_aware import ViewpointAwareTerms


def test_the_viewpoint_aware_option_is_the_loss_of_the_paper():
    torch.manual_seed(0)
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[3, 2] = False
    aware = ViewpointAwareTerms(6, TrainingClasses(5, 3, mask))
    W, U = aware.loss.identity_centers, aware.loss.viewpoint_centers
    with torch.no_grad():
        W.normal_()
        U.normal_()
    batch = batch_of(torch.zeros(8, 3, 4, 4))
    feature = torch.randn(8, 6, requires_grad=True)
    terms = aware(feature, batch)
    identity, viewpoint = viewpoint_aware_cross_entropy(
        feature @ W.T,
        torch.einsum("nd,kvd->nkv", feature, U),
        batch.identity,
        batch.viewpoint,
        smoothing="adaptive",
        alpha=0.2,
        mask=mask,
    )
    wanted = identity + viewpoint + 0.1 * angular_center_regularizer(W, U, mask=mask)
    total = sum(term.weight * term.value for term in terms.values())
    torch.testing.assert_close(total, wanted)
    of = (feature, W, U)
    for have, want in zip(torch.autograd.grad(total, of), torch.autograd.grad(wanted, of), strict=True):
        torch.testing.assert_close(have, want)


def test_the_viewpoint_aware_option_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    aware = ViewpointAwareTerms(6, TrainingClasses(5, 3, torch.ones(5, 3, dtype=torch.bool)))
    batch, feature = batch_of(torch.zeros(7, 3, 4, 4)), torch.randn(7, 6).bfloat16()
    plain = aware(feature.float(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = aware(feature, batch)
    for name, term in plain.items():
        assert term.value.dtype == torch.float32
        torch.testing.assert_close(cast[name].value, term.value, rtol=0, atol=0)


AWARE = [name for name, kind in METHODS.items() if "viewpoint_aware" in {f.name for f in fields(kind.Config)}]
SETTINGS = {
    **SMALL,
    "mgn": {"stage": "layer4"},
    "pyramid": {"rows": 2},
    "hpm": {"rows": (1, 2)},
    "hacnn": {"widths": (16, 16, 16)},
    "abdnet": {"dim": 16},
    "dsa": {"dim": 16},
    "oscnn": {"label_epochs": 0},
}


@pytest.mark.parametrize("name", AWARE)
def test_every_method_with_the_option_is_trained_by_that_loss(name):
    method = method_of(name, **SETTINGS.get(name, {}), viewpoint_aware=True).eval()
    height = 96 if name == "mgn" else 64  # of which it cuts halves and thirds
    batch = pose_batch(n=4, height=height, width=64)
    surface = torch.stack([torch.arange(4 * height * 64).reshape(4, height, 64) % 25] * 3, 1).byte()
    extras = {"parsing": torch.ones(4, 5, height, 64), "iuv": surface}
    batch = replace(batch, extras=batch.extras | extras)
    terms = method(batch)
    assert "viewpoint" in method.inputs_with(METHODS[name].Config(viewpoint_aware=True))
    ((where, part),) = [(n, part) for n, part in method.named_modules() if isinstance(part, ViewpointAwareTerms)]
    features = method.features(batch)
    feature = features[-1 if name == "pyramid" else 0]
    if name == "spreid":
        feature = torch.cat(features, 1)
    elif name.startswith("pngan"):
        feature = method.photograph(batch.image)
    for term, expected in part(feature, batch).items():
        torch.testing.assert_close(terms[term].value, expected.value)
    # Its centres are of the training identities, it reaches the network, and nothing is left without a loss.
    assert any(where == head or where.startswith(f"{head}.") for head in method.heads)
    named = dict(method.named_parameters())
    centers = named[f"{where}.loss.viewpoint_centers"]
    kernels = [p for p in named.values() if p.ndim == 4]
    own = torch.autograd.grad(terms["viewpoint"].value, [centers, *kernels], retain_graph=True, allow_unused=True)
    assert own[0].abs().sum() > 0
    assert any(gradient is not None for gradient in own[1:])
    sum(term.weight * term.value for term in terms.values()).backward()
    assert [n for n, parameter in named.items() if parameter.requires_grad and parameter.grad is None] == []


def test_the_page_names_the_methods_with_the_viewpoint_aware_option():
    page = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
    sentence = re.search(r"`--viewpoint-aware` trains (.*?)\swith", page, re.DOTALL)[1]
    assert re.findall(r"`(.*?)`", sentence) == AWARE
