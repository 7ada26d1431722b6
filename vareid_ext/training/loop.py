"""The training loop."""

from __future__ import annotations

from vareid_ext.training.run import Run


def train(run: Run) -> None:
    """Train from wherever the run is to its last epoch."""
    with run.showing():
        for epoch in run.epochs():
            for batch in run.batches(epoch):
                terms = run.forward(batch)
                run.step(terms)
                run.log(terms)
                run.stop_if_asked()
            run.end_epoch(epoch)
