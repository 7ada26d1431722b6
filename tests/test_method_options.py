"""What several methods have in common beside their base class."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import torch

from tests.tiny import batch_of
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


def test_the_page_names_the_methods_with_the_viewpoint_aware_option():
    page = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
    sentence = re.search(r"`--viewpoint-aware` trains (.*?) with", page)[1]
    names = [name for name, kind in METHODS.items() if "viewpoint_aware" in {f.name for f in fields(kind.Config)}]
    assert re.findall(r"`(.*?)`", sentence) == names
