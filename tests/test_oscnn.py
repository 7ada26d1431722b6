"""OSCNN: how the oriented layers are mixed, and by what they learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import batch_of, method_of, without_gradient
from vareid_ext.losses import batch_hard_triplet
from vareid_ext.methods.oscnn import orientations


def images(count=9):
    return batch_of(torch.rand(count, 3, 64, 32, generator=torch.Generator().manual_seed(1)))


def sharp(method):
    """With a gate that is sure of itself."""
    with torch.no_grad():
        method.gate.weight.normal_(std=20)
    return method


def test_labels_choose_the_layer_at_first_and_the_gate_later():
    method, batch = sharp(method_of("oscnn", dim=6, label_epochs=2)).eval(), images()
    seen = []
    method.neck.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch.viewpoint[0] = -1
    pooled = method.pool(method.backbone(batch.image))
    each = torch.stack([layer(pooled) for layer in method.oriented])
    by_gate = sum(method.gate(pooled).softmax(1)[:, v, None] * each[v] for v in range(3))
    by_label = torch.stack([each[v, n] if n else by_gate[0] for n, v in enumerate(batch.viewpoint)])
    assert not torch.allclose(by_label[1:], by_gate[1:])
    for epoch, wanted in ((0, by_label), (1, by_label), (2, by_gate)):
        method.at_epoch(epoch)
        method(batch)
        torch.testing.assert_close(seen.pop(), wanted)
    torch.testing.assert_close(method.features(batch)[0], method.neck(by_gate))


def test_the_losses_against_plain_formulas():
    method, batch = sharp(method_of("oscnn", dim=6, label_epochs=0)).eval(), images()
    batch.viewpoint[4] = -1
    pooled = method.pool(method.backbone(batch.image))
    feature = method.mixed(pooled, method.gate(pooled).softmax(1))
    known = batch.viewpoint >= 0
    terms = method(batch)
    wanted = {
        "identity": (1, F.cross_entropy(method.head(method.neck(feature)), batch.identity)),
        "triplet": (1, batch_hard_triplet(feature, batch.identity, margin=0.3)),
        "orientation": (0.1, F.cross_entropy(method.gate(pooled)[known], batch.viewpoint[known])),
    }
    assert set(terms) == set(wanted)
    for name, (weight, value) in wanted.items():
        assert terms[name].weight == weight
        torch.testing.assert_close(terms[name].value, value)


def test_the_gate_learns_from_labels_alone_at_first():
    method, batch = method_of("oscnn", dim=6), images()
    assert not without_gradient(method, batch)
    for epoch, learns in ((0, False), (10, True)):
        method.at_epoch(epoch)
        method.zero_grad()
        method(batch)["identity"].value.backward()
        assert (method.gate.weight.grad is not None) == learns
    assert not without_gradient(method, batch)


def test_soft_labels_of_one_view_are_hard_labels_and_no_labels_are_no_error():
    method, batch = method_of("oscnn", dim=6).eval(), images()
    soft = replace(batch, viewpoint=F.one_hot(batch.viewpoint, 3).float())
    for name, term in method(batch).items():
        torch.testing.assert_close(method(soft)[name].value, term.value)
    unknown = replace(batch, viewpoint=torch.full_like(batch.viewpoint, -1))
    assert method(unknown)["orientation"].value == 0
    label, known = orientations(unknown.viewpoint, 3)
    assert label.shape == (9, 3)
    assert not known.any()


def test_the_viewpoint_aware_loss_takes_the_place_of_the_cross_entropy():
    method, batch = method_of("oscnn", dim=6, viewpoint_aware=True), images()
    assert set(method(batch)) == {"global identity", "viewpoint", "regularizer", "triplet", "orientation"}
    assert not without_gradient(method, batch)


def test_settings_outside_what_is_allowed_are_named():
    for settings, words in (({"dim": 0}, "method.dim: 0"), ({"label_epochs": -1}, "method.label_epochs: -1")):
        with pytest.raises(ValueError, match=f"{words} was given; allowed are values from"):
            method_of("oscnn", **settings)
