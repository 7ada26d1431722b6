"""Where the time of a training step goes: data, backbone, heads (the products with the centres), loss, optimizer.

The Market recipe is run with its own backbone and sizes, but 8 images in place of 96, to end in a minute or two. A part
of the loss (the regularizer) costs the same for every batch: its share of the recipe's own step is smaller.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from benchmarks.harness import Suite
from vareid_ext import angular_center_regularizer, viewpoint_aware_cross_entropy
from vareid_ext.data import PKSampler, ReidDataset, SyntheticSettings, build_transform, collate, synthetic_data
from vareid_ext.methods import METHODS, TrainingClasses
from vareid_ext.training.command_line import parse
from vareid_ext.training.config import DEFAULT_IDENTITIES, Config
from vareid_ext.training.optimizers import build_optimizer


def run_case(suite: Suite, name: str, config: Config, num_identities: int, *, rounds: int | None = None) -> None:
    P, K = config.sampler.identities or DEFAULT_IDENTITIES, config.sampler.instances
    # Enough rendered people to draw batches from; the heads have the data set's number of identities.
    people = SyntheticSettings(identities_train=P, identities_test=1, images_per_identity=6, distractors=0)
    data = synthetic_data(people)
    batches = iter(PKSampler(data.train, identities_per_batch=P, instances=K, batches_per_epoch=1000))
    transform = build_transform(
        config.data.height, config.data.width, train=True, pad=config.data.pad, erasing=config.data.erasing
    )
    images = ReidDataset(data.train, transform)
    torch.manual_seed(0)
    classes = TrainingClasses(num_identities, 3, torch.ones(num_identities, 3, dtype=torch.bool))
    trunk = replace(config.model, pretrained=False)
    method: Any = METHODS[config.method.name](config.method, trunk, classes)
    method.to(suite.device).to(memory_format=torch.channels_last)
    loss = method.loss
    optimizer = build_optimizer(config.optimizer, method)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def load() -> Any:
        batch = collate([images[draw] for draw in next(batches)]).to(suite.device)
        return replace(batch, image=batch.image.contiguous(memory_format=torch.channels_last))

    batch = load()
    feature = torch.randn(P * K, method.backbone.channels, device=suite.device, requires_grad=True)
    W, U = loss.identity_centers, loss.viewpoint_centers
    assert U is not None
    z, s = (torch.randn(P * K, *C.shape[:-1], device=suite.device, requires_grad=True) for C in (W, U))

    def backbone() -> None:
        (output,) = method.features(batch)
        output.backward(torch.ones_like(output))

    def heads() -> None:
        for centers, logits in ((W, z), (U.flatten(0, 1), s.flatten(1))):
            functional.linear(feature, centers).backward(logits.detach())

    def losses() -> None:
        L_y, L_v = viewpoint_aware_cross_entropy(z, s, batch.identity, batch.viewpoint)
        (L_y + L_v + loss.beta * angular_center_regularizer(W, U)).backward()

    def step() -> None:
        terms = method(load())
        optimizer.zero_grad(set_to_none=True)
        sum(term.weight * term.value for term in terms.values()).backward()
        optimizer.step()

    def drop_gradients() -> None:
        feature.grad = z.grad = s.grad = None
        optimizer.zero_grad(set_to_none=True)

    step()
    gradients = [p.grad for p in parameters]

    def update() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    pieces = {"data": load, "backbone": backbone, "heads": heads, "loss": losses, "optimizer": update}
    record = suite.case(name, {**pieces, "whole step": step}, setup=drop_gradients, rounds=rounds)
    if record is not None:
        whole = record["contenders"]["whole step"]["median_s"]
        shares = {piece: record["contenders"][piece]["median_s"] / whole for piece in pieces}
        record["shares"] = shares
        print("  share of the whole step: " + ", ".join(f"{piece} {share:.1%}" for piece, share in shares.items()))
        print(f"  {P * K / whole:.0f} images/s with loading in the main process")


def main() -> None:
    suite = Suite("train_step", description=__doc__ or "")
    run_case(suite, "recipe synthetic, K=200", parse([]).config, 200)
    if not suite.quick:
        small_batch = ["--sampler.identities=4", "--sampler.instances=2"]
        market = parse(["--recipe=market1501-va-reid", "--root=unused", *small_batch]).config
        name = f"recipe market1501-va-reid ({market.model.backbone}, 384 x 128), 8 images, K=751"
        run_case(suite, name, market, 751, rounds=min(3, suite.arguments.rounds))
    suite.finish()


if __name__ == "__main__":
    main()
