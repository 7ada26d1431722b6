"""Keypoints in the files of pose estimators, all as the 14 joints of `BODY_PAIRS`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vareid_ext.data.text_files import shown
from vareid_ext.data.types import is_litter
from vareid_ext.files.features import open_arrays

JOINTS = 14

# Source of each joint: head, neck, right shoulder, elbow, wrist, left ..., right hip, knee, ankle, left ...; two
# numbers are a mean of two. COCO's head is made of the face's points instead.
_ORDERS: Mapping[str, tuple[int | tuple[int, int], ...]] = {
    "cpm": tuple(range(14)),
    "lsp": (13, 12, 8, 7, 6, 9, 10, 11, 2, 1, 0, 3, 4, 5),
    "mpii": (9, 8, 12, 11, 10, 13, 14, 15, 2, 1, 0, 3, 4, 5),
    "coco": (0, (5, 6), 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15),
    "openpose18": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
    "body25": (0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14),
}
_COUNTS = {"cpm": 14, "lsp": 14, "mpii": 16, "coco": 17, "openpose18": 18, "body25": 25}
ORDERS = ("auto", *_ORDERS)
"""Orders in which keypoints are listed; auto goes by their number: 16 mpii, 17 coco, 18 openpose18, 25 body25."""

_BEYOND, _REACHED, _ENOUGH = 1.1, 0.6, 10  # of check_frame: shares of the image's size, and people

_POINTS_28 = 2 * JOINTS
_MARKET_FILES = {"bounding_box_train": "train", "query": "query", "bounding_box_test": "gallery"}


def to_joints(points: np.ndarray, order: str = "auto") -> np.ndarray:
    """Keypoints [..., P, 3] in one of `ORDERS` -> float32 [..., 14, 3], the confidences brought into [0, 1].

    COCO has no neck, which is the middle of the shoulders with the smaller confidence, and no head, which is the nose,
    or the mean of those eyes and ears that are seen.
    """
    points = np.asarray(points, dtype=np.float32)
    count = points.shape[-2]
    if order == "auto":
        order = next((name for name in ("mpii", "coco", "openpose18", "body25") if _COUNTS[name] == count), "")
        if not order:
            hint = "; 14 may be in the order cpm or lsp, which has to be said" if count == JOINTS else ""
            raise ValueError(f"{count} keypoints were given; allowed are 16, 17, 18 and 25{hint}")
    if _COUNTS[order] != count:
        raise ValueError(f"{count} keypoints were given; the order {order} has {_COUNTS[order]}")
    if not np.isfinite(points).all():
        raise ValueError("infinite or undefined keypoints were given; allowed are finite ones")
    points = np.concatenate([points[..., :2], points[..., 2:].clip(0, 1)], axis=-1)
    joints = []
    for source in _ORDERS[order]:
        if isinstance(source, tuple):
            pair = points[..., source, :]
            joint = np.concatenate([pair[..., :2].mean(axis=-2), pair[..., 2:].min(axis=-2)], axis=-1)
        else:
            joint = points[..., source, :]
        joints.append(joint)
    if order == "coco":
        joints[0] = np.where(joints[0][..., 2:] > 0, joints[0], _mean_of_seen(points[..., 1:5, :]))
    return np.stack(joints, axis=-2)


def _mean_of_seen(points: np.ndarray) -> np.ndarray:
    """[..., P, 3] -> [..., 3], the mean of the points whose confidence is not 0."""
    seen = points[..., 2:] > 0
    return (points * seen).sum(axis=-2) / np.maximum(seen.sum(axis=-2), 1)


class People(NamedTuple):
    """Those on an image."""

    joints: np.ndarray
    """[M, 14, 3]"""
    size: tuple[Any, Any] | None = None
    """width and height of the image, where the file states them"""


def load_person(people: np.ndarray, height: int, width: int, size: tuple[Any, Any] | None = None) -> np.ndarray:
    """Of joints [M, 14, 3], the person of an image: whose confidences inside it add up to the most.

    Raises:
        ValueError: the joints belong to an image of another size: `size`, the stated (width, height), is not that of
            the image, or most of that person's joints are outside it.
    """
    if size is not None and size != (width, height):
        raise ValueError(
            f"keypoints of an image of {size[0]} x {size[1]} pixels were given; the image has {width} x {height} pixels"
        )
    person, inside = _most_seen(people, height, width)
    seen = person[:, 2] > 0
    if 2 * (seen & inside).sum() < seen.sum():
        x, y = person[seen, :2].max(axis=0)
        raise ValueError(
            f"keypoints up to x = {x:.0f}, y = {y:.0f} were given; the image has {width} x {height} pixels: they "
            "belong to an image of another size"
        )
    return person


def _most_seen(people: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The person whose confidences inside the image add up to the most, and bool [14] which joints are inside."""
    x, y, confidence = np.moveaxis(people, -1, 0)
    inside = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    best = int((confidence * inside).sum(axis=1).argmax())
    return people[best], inside[best]


def check_frame(images: Sequence[tuple[np.ndarray, int, int]]) -> None:
    """ValueError where the joints of many images are those of images of another size.

    Of people cut out by a detector some reach the lower or right half of their image, and few reach beyond it.

    Args:
        images: joints [M, 14, 3] of the people on each, its height and width.
    """
    reach, beyond = np.zeros(2), 0
    for people, height, width in images:
        person, _ = _most_seen(people, height, width)
        seen = person[person[:, 2] > 0, :2] / (width, height)
        reach = np.maximum(reach, seen.max(axis=0, initial=0))
        beyond += bool((seen > _BEYOND).any())
    if len(images) >= _ENOUGH and (2 * beyond > len(images) or (reach < _REACHED).all()):
        raise ValueError(
            f"keypoints: in {len(images)} images that were looked at they reach {reach[0]:.0%} of the width and "
            f"{reach[1]:.0%} of the height: they belong to images of another size; pixels of the image files are needed"
        )


def read_keypoint_list(path: Path, order: str) -> dict[str, People]:
    """Image -> the people on it, from a JSON file of COCO's kind.

    It is a list of {"image_id", "keypoints": x, y, confidence, x, ...}, as AlphaPose writes, or COCO's
    {"images": [{"id", "file_name", perhaps "width", "height"}], "annotations": that list}. Images are called by path or
    file name.

    Raises:
        OSError, ValueError: the file cannot be read, or is not as described.
    """
    content = _read_json(path)
    names: dict[str, str] | None = None
    sizes: dict[str, tuple[Any, Any]] = {}
    if isinstance(content, dict):
        names = _image_names(_get(content, "images", path), path)
        stated = [image for image in content["images"] if {"width", "height"} <= {*image}]
        sizes = {image["file_name"]: (image["width"], image["height"]) for image in stated}
        content = _get(content, "annotations", path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: {type(content).__name__} was given; a list of people is needed")
    people: dict[str, list[np.ndarray]] = {}
    for entry in content:
        image = _get(entry, "image_id", path)
        if names is not None:
            if json.dumps(image) not in names:
                raise ValueError(f"{path}: image_id {shown(image)} was given; its images have no such id")
            image = names[json.dumps(image)]
        if not isinstance(image, str):
            raise ValueError(f"{path}: image_id {shown(image)} was given; a file name is needed, or COCO's images")
        people.setdefault(image, []).append(_joints(_get(entry, "keypoints", path), order, path, image))
    return {image: People(np.stack(found), sizes.get(image)) for image, found in people.items()}


def _image_names(images: Any, path: Path) -> dict[str, str]:
    """File names by id, as JSON writes it, of COCO's images. ValueError where one of the two is given twice."""
    names: dict[str, str] = {}
    ids: dict[str, str] = {}
    if not isinstance(images, list):
        raise ValueError(f"{path}: images: {type(images).__name__} was given; a list is needed")
    for image in images:
        number, file = json.dumps(_get(image, "id", path)), _get(image, "file_name", path)
        if not isinstance(file, str):
            raise ValueError(f"{path}: file_name {shown(file)} was given; a text is needed")
        if number in names:
            raise ValueError(f"{path}: id {number} was given to two images, {shown(names[number])} and {shown(file)}")
        if file in ids:
            raise ValueError(f"{path}: file_name {shown(file)} was given to two images, of id {ids[file]} and {number}")
        names[number], ids[file] = file, number
    return names


def read_keypoint_file(path: Path, order: str) -> np.ndarray:
    """Joints [M, 14, 3] of the people on an image: of OpenPose's or MMPose's JSON, or of an array [P, 3] or [M, P, 3].

    MMPose's is a list of {"keypoints": [[x, y], ...], "keypoint_scores": [...]}, or has it under "instance_info".
    """
    if path.suffix.lower() != ".json":
        (array,) = open_arrays(path).values()
        points = np.asarray(array.read())
        if points.ndim not in (2, 3) or points.shape[-1] != 3 or points.dtype.kind not in "uif":
            raise ValueError(f"{path}: {points.dtype} {list(points.shape)} was given; [P, 3] or [M, P, 3] is needed")
        try:
            return to_joints(points.reshape(-1, *points.shape[-2:]), order)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    content = _read_json(path)
    key = "instance_info" if isinstance(content, dict) and "instance_info" in content else "people"
    people = content if isinstance(content, list) else _get(content, key, path)
    if not isinstance(people, list):
        raise ValueError(f"{path}: {key} is {type(people).__name__}; a list is needed")
    if people is content or key == "instance_info":
        given = [(_get(person, "keypoints", path), _get(person, "keypoint_scores", path)) for person in people]
    else:
        given = [(_get(person, "pose_keypoints_2d", path), None) for person in people]
    found = [_joints(numbers, order, path, "people", scores) for numbers, scores in given]
    return np.stack(found) if found else np.empty((0, JOINTS, 3), np.float32)


def market_file(folder: Path, images: Path) -> Path | None:
    """The file in `folder` with the public joints of Market-1501's folder `images`, if there is one."""
    split = _MARKET_FILES.get(images.name)
    names = [folder / f"market1501_14point_{split}{suffix}" for suffix in (".npz", ".mat")]
    return next((name for name in names if split and name.is_file()), None)


def read_market_points(path: Path, images: Path) -> dict[str, np.ndarray]:
    """Image path -> joints [1, 14, 3], from a file of ``layumi/market1501_body_point``.

    Its array ``pp`` [28, N] has 14 x and 14 y, counted from 1, for each of the .jpg files in the folder `images` in
    sorted order, junk included. Every joint has confidence 1.
    """
    arrays = open_arrays(path)
    if "pp" not in arrays:
        raise ValueError(f"{path}: it has no array 'pp', but {', '.join(arrays)}")
    points = np.asarray(arrays["pp"].read())
    if points.ndim == 2 and points.shape[0] != _POINTS_28:
        points = points.T  # as programs other than MATLAB save it
    files = sorted(name for name in os.listdir(images) if name.lower().endswith(".jpg") and not is_litter(name))
    if points.shape != (_POINTS_28, len(files)):
        raise ValueError(
            f"{path}: pp {list(points.shape)} was given; [{_POINTS_28}, {len(files)}] is needed, a column for each "
            f".jpg file in {images}"
        )
    joints = np.ones((len(files), JOINTS, 3), np.float32)
    joints[..., :2] = points.T.reshape(-1, 2, JOINTS).transpose(0, 2, 1) - 1
    return {str(images / file): person[None] for file, person in zip(files, joints, strict=True)}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error


def _get(entry: Any, key: str, path: Path) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise ValueError(f"{path}: {shown(entry)} was given where an object with {key!r} is needed")
    return entry[key]


def _joints(numbers: Any, order: str, path: Path, image: str, scores: Any = None) -> np.ndarray:
    """Numbers x, y, confidence, x, ..., or [x, y], ... with the confidences in `scores` -> joints [14, 3]."""
    try:
        points = np.array(numbers, dtype=np.float32)
        if scores is not None:
            points = np.column_stack([points.reshape(-1, 2), np.array(scores, dtype=np.float32)])
        return to_joints(points.reshape(-1, 3), order)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: keypoints of {shown(image)}: {error}") from error
