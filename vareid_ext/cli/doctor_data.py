"""``vareid doctor DATA``: what a data set holds, and what in it will hurt."""

from __future__ import annotations

import argparse

from vareid_ext.cli.common import Result


def data_report(options: argparse.Namespace) -> Result:
    """The data set's table and findings; exit status 1 where one of them is a problem."""
    from vareid_ext.data import load_data
    from vareid_ext.data.inspection import inspect
    from vareid_ext.data.viewpoint_classes import declared_classes

    names = options.viewpoints.split(",") if options.viewpoints else ()
    data = load_data(
        options.kind,
        options.data,
        viewpoint_file=options.viewpoint_file,
        viewpoints=declared_classes(names, bins=options.viewpoint_bins, prefix="--"),
        check_images=False,
        progress=not options.quiet,
    )
    findings = inspect(data, progress=not options.quiet)
    lines = [data.summary(), ""]
    lines += [f"{'problem' if f.problem else 'note'}: {f.count:,} {f.text}" for f in findings]
    problems = sum(finding.problem for finding in findings)
    verdict = f"{problems} problems" if problems else "no problems"
    splits = {
        split: {"images": len(images), "identities": len(set(images.identity.tolist()))}
        for split, images in data.splits.items()
    }
    values = {
        "splits": splits, "viewpoints": list(data.classes.names), "notes": list(data.notes),
        "findings": [vars(finding) for finding in findings], "problems": problems,
    }  # fmt: skip
    return Result("\n".join([*lines, verdict]), values, status=1 if problems else 0)
