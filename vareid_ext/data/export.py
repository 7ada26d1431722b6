"""Writing a data set out as a manifest and its images, to look at, to change or to load again."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from pathlib import Path

from tqdm import tqdm

from vareid_ext._labels import COLUMN, UNKNOWN
from vareid_ext.data.types import ReidData
from vareid_ext.files.atomic import naming


def write_manifest(data: ReidData, folder: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Write the images of `data` as PNG files and a `manifest.csv` that lists them into a new folder.

    `read_manifest` gives back the same pixels, cameras, viewpoints and further columns, and the same division into
    identities; training identities are written as `train-<name>`, since their names may be those of other people in
    query and gallery.
    The folder appears when it is complete.

    Returns:
        The path of the manifest.

    Raises:
        FileExistsError: `folder` exists.
        OSError: an image cannot be read, or the folder not be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"folder must not exist yet, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        total = sum(len(images) for images in data.splits.values())
        with (
            naming(folder),
            (unfinished / "manifest.csv").open("w", newline="", encoding="utf-8") as file,
            tqdm(total=total, desc="writing images", unit="image", disable=not progress, leave=False) as bar,
        ):
            writer = csv.writer(file, lineterminator="\n")
            columns = list(dict.fromkeys(name for images in data.splits.values() for name in images.columns))
            further = (f"{COLUMN}{name}" for name in columns)
            writer.writerow(("path", "identity", "camera", "viewpoint", "split", *further))
            for split, images in data.splits.items():
                (unfinished / split).mkdir()
                for index in range(len(images)):
                    name = f"{split}/{index:06d}.png"
                    images.load(index).save(unfinished / name)
                    number = int(images.identity[index])
                    identity = f"train-{data.identity_names[number]}" if split == "train" else str(number)
                    camera = "" if images.camera[index] < 0 else str(images.camera[index])
                    labels = (
                        images.columns[column][index] if column in images.columns else UNKNOWN for column in columns
                    )
                    cells = ("" if label == UNKNOWN else str(label) for label in labels)
                    writer.writerow((name, identity, camera, images.viewpoint_name[index], split, *cells))
                    bar.update()
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder / "manifest.csv"
