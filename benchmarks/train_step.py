"""Where the time of a training step goes: data, backbone, heads and loss, optimizer."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness import Suite
from vareid_ext import ViewpointAwareLoss
from vareid_ext.config import Config
from vareid_ext.data import PKSampler, ReidDataset, SyntheticSettings, build_transform, collate, synthetic_data
from vareid_ext.models import ReidModel
from vareid_ext.train import training_loss
from vareid_ext.training.command_line import parse
from vareid_ext.training.state import build_optimizer


def run_case(suite: Suite, name: str, config: Config, num_identities: int, *, rounds: int | None = None) -> None:
    P, K = config.sampler.identities, config.sampler.instances
    # Enough rendered people to draw batches from; the heads have the data set's number of identities.
    people = SyntheticSettings(identities_train=P, identities_test=1, images_per_identity=6, distractors=0)
    data = synthetic_data(people)
    batches = iter(PKSampler(data.train, identities_per_batch=P, instances=K, batches_per_epoch=1000))
    transform = build_transform(
        config.data.height, config.data.width, train=True, pad=config.data.pad, erasing=config.data.erasing
    )
    images = ReidDataset(data.train, transform)
    torch.manual_seed(0)
    model = ReidModel(
        config.model.backbone,
        backbone_options=config.model.backbone_options,
        last_stride=config.model.last_stride,
        input_norm=config.model.input_norm,
    )
    model.to(suite.device).to(memory_format=torch.channels_last)
    loss = ViewpointAwareLoss(num_identities, model.feature_dim).to(suite.device)
    parameters = [p for p in (*model.parameters(), *loss.parameters()) if p.requires_grad]
    optimizer = build_optimizer(config.optimizer, parameters)

    def load() -> Any:
        return collate([images[draw] for draw in next(batches)]).to(suite.device)

    batch = load()
    feature = torch.randn(P * K, model.feature_dim, device=suite.device, requires_grad=True)

    def backbone() -> None:
        output = model(batch.image.contiguous(memory_format=torch.channels_last))
        output.feature.backward(torch.ones_like(output.feature))

    def heads_and_loss() -> None:
        loss(feature, batch.identity, batch.viewpoint).total.backward()

    def step() -> None:
        parts = training_loss(config, model, loss, load())
        optimizer.zero_grad(set_to_none=True)
        parts["total"].backward()
        optimizer.step()

    step()
    pieces = {"data": load, "backbone": backbone, "heads and loss": heads_and_loss, "optimizer": optimizer.step}
    record = suite.case(name, {**pieces, "whole step": step}, rounds=rounds)
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
        small_batch = ["--sampler.identities=8", "--sampler.instances=2", "--backbone=resnet50"]
        market = parse(["--recipe=market1501-va-reid", "--root=unused", *small_batch]).config
        run_case(suite, "ResNet-50, 384 x 128, 16 images, K=751", market, 751, rounds=min(5, suite.arguments.rounds))
    suite.finish()


if __name__ == "__main__":
    main()
