"""``vareid export RUN``: the test feature of a trained model as a graph, compared with PyTorch; the model to share."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.extract import read_images
from vareid_ext.data import UNKNOWN, Batch, build_transform
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.pretrained import FILES, check_target
from vareid_ext.trained import TrainedModel, load_trained
from vareid_ext.training.program import load_run_data

_DESCRIPTION = """\
The test feature of a trained model as an ONNX file or a program of torch.export, for any number of images at once.

RUN is a run folder or a checkpoint. The graph's input is "images", its output "feature", float32 [N, D], the mirrored
image and the feature's normalisation inside as in the run's evaluation. "images" are, of the run's height and width,
  float32  [N, 3, height, width], red, green, blue in [0, 1], the mean subtracted, divided by the standard deviation
  uint8    [N, height, width, 3], red, green, blue as they come out of a decoder; the graph does the rest

Methods that read an input beside each image, such as a parsing, have it as a further input of that name, in the form
that vareid_ext.data.EXTRAS says, of the images' height and width.

--pretrained DIR writes the model itself, to share it: weights (safetensors), their description and a model card. All
commands and vareid_ext.load take the folder as they take a run.

Each graph is compared with PyTorch on images of the run's test set (or of --images) in batches of 1, 2 and 17 before it
appears. FILE.json says what was found and what the graph takes. A difference above 1e-4 is an error and leaves no file.
"""
_EXAMPLES = """\
  vareid export runs/mine --onnx mine.onnx
  vareid export runs/mine --onnx mine.onnx --image-input uint8 --images photos/
  vareid export runs/mine --torch-export mine.pt2 --size 256x128
  vareid export runs/mine --pretrained mine --license cc-by-4.0
"""
_BATCHES = (1, 2, 17)
_TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def _parser() -> Parser:
    parser = command_parser("export", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--onnx", metavar="FILE", help="write an .onnx file")
    parser.add_argument("--torch-export", metavar="FILE", help="write a program of torch.export, .pt2")
    parser.add_argument("--pretrained", metavar="DIR", help="write a folder with the model and a model card")
    parser.add_argument("--license", metavar="ID", help="of the weights, for the card, such as apache-2.0")
    parser.add_argument("--data-license", metavar="TEXT", help="of the training data, for the card")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that the folder holds")
    parser.add_argument(
        "--image-input", choices=("float32", "uint8"), default="float32", help="what it takes (default: %(default)s)"
    )
    parser.add_argument("--size", type=_size, metavar="HxW", help="of the images, pixels (default: as trained)")
    parser.add_argument("--images", metavar="IMAGES", help="what it is tried on: a folder, an image, a list (.txt)")
    return parser


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and all(16 <= int(n) <= 4096 for n in (height, width))):
        raise argparse.ArgumentTypeError(
            f"{text!r} was given; HEIGHTxWIDTH is needed, such as 256x128, from 16 to 4096"
        )
    return int(height), int(width)


class FeatureGraph(nn.Module):
    """The test feature as a function of the images and of what the method reads beside them.

    Args:
        model: whose feature it is.
        image_input: "float32", images [N, 3, H, W] normalised; or "uint8", [N, H, W, 3].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel, image_input: str) -> None:
        super().__init__()
        self.method, self.how, self.image_input = model.method, model.preprocessing, image_input
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(self.how, name)).reshape(3, 1, 1))

    def forward(self, images: Tensor, *extras: Tensor) -> Tensor:
        """Images, and the method's `test_inputs` in their order -> float32 [N, D]."""
        if self.image_input == "uint8":
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        unknown = torch.full((images.shape[0],), UNKNOWN)
        beside = dict(zip(self.method.test_inputs, extras, strict=True))
        batch = Batch(images, unknown, unknown, unknown, unknown, beside)
        return self.method.embed(batch, flip=self.how.flip, normalize=self.how.normalize)


def _run(options: argparse.Namespace) -> Result:
    files = {
        name: check_writable(given, (suffix,))
        for name, given, suffix in (("onnx", options.onnx, ".onnx"), ("torch_export", options.torch_export, ".pt2"))
        if given is not None
    }
    if not files and options.pretrained is None:
        raise ValueError("--onnx, --torch-export, --pretrained: none was given; one of them is needed")
    if options.pretrained is not None:
        check_target(options.pretrained, options.overwrite)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if "onnx" in files and missing:
        raise ValueError(f"--onnx: {', '.join(missing)} is not installed; type: pip install 'vareid_ext[export]'")
    model = load_trained(options.run, "cpu")
    if options.size is not None:
        height, width = options.size
        model.preprocessing = replace(model.preprocessing, height=height, width=width)
    result = _export(model, files, options) if files else Result("", {})
    if options.pretrained is None:
        return result
    folder = Path(options.pretrained)
    terms = {"license": options.license, "data_license": options.data_license}
    model.save_pretrained(folder, **terms, overwrite=options.overwrite)
    text = f"{result.text}\n{folder}: {', '.join(FILES)}".lstrip()
    return Result(text, {**result.values, "pretrained": {"folder": str(folder), **terms}})


def _export(model: TrainedModel, files: Mapping[str, Path], options: argparse.Namespace) -> Result:
    """Write the graphs."""
    model.method.to(memory_format=torch.contiguous_format)
    samples = _samples(model, options)
    names = ("images", *model.method.test_inputs)
    inputs = dict(zip(names, _inputs(model, samples, options.image_input), strict=True))
    expected = {n: _features(model, samples[:n]) for n in _BATCHES}
    feature = FeatureGraph(model, options.image_input).eval()
    try:
        program = _program(feature, inputs)
    except Exception as error:  # the compiler fails on what it does not know with whatever it runs into
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"method {model.config.method.name!r} cannot be exported: {reason}") from error
    about = _about(model, options.image_input, inputs, expected[1])
    contents, values, lines = {}, {}, []
    for name, path in files.items():
        with tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / path.name
            call = _WRITERS[name](program, draft, names)
            checked = _compare(call, inputs, expected, path)
            contents[path] = draft.read_bytes()
        values[name] = {"file": str(path), **about, "checked": checked}
        contents[path.with_name(f"{path.name}.json")] = (json.dumps(values[name], indent=2) + "\n").encode()
        close = f"{checked['max_difference']:.1e} or less, cosine {checked['min_cosine']:.7f} or more"
        lines.append(f"{path}: {len(contents[path]) / 1e6:.1f} MB; its features differ from PyTorch's by {close}")
    for path, content in contents.items():
        with atomic_file(path) as file:
            file.write(content)
    return Result("\n".join(lines), values)


_Sample = tuple[Image.Image, dict[str, Any]]


def _samples(model: TrainedModel, options: argparse.Namespace) -> list[_Sample]:
    """As many images, with their extras, as the largest batch has; the first ones again where there are fewer."""
    if options.images is not None:
        if model.method.test_inputs:
            raise ValueError(
                f"--images: method {model.config.method.name!r} reads {', '.join(model.method.test_inputs)} beside the "
                "images; it is tried on the run's test images"
            )
        viewpoints = model.config.data.declared_viewpoints()
        lists = [read_images(options.images, None, None, progress=not options.quiet, viewpoints=viewpoints)[0]]
    else:
        data = load_run_data(model.config, progress=not options.quiet)
        lists = [data.query, data.gallery]
    places = [(images, i) for images in lists for i in range(min(len(images), max(_BATCHES)))]
    samples = []
    for images, i in islice(cycle(places), max(_BATCHES)):
        picture = images.load(i)
        samples.append((picture, images.load_extras(i, picture.height, picture.width)))
    return samples


def _features(model: TrainedModel, samples: Sequence[_Sample]) -> Tensor:
    """The features of a batch."""
    beside = {name: [np.asarray(extras[name]) for _, extras in samples] for name in model.method.test_inputs}
    return model.embed([picture for picture, _ in samples], batch_size=len(samples), extras=beside)


def _inputs(model: TrainedModel, samples: Sequence[_Sample], image_input: str) -> list[Tensor]:
    """The images, and what the method reads beside them, as the graph takes them."""
    how = model.preprocessing
    transform = build_transform(how.height, how.width, train=False, mean=how.mean, std=how.std)
    pairs = [transform(*sample) for sample in samples]
    images = torch.stack([image for image, _ in pairs])
    if image_input == "uint8":
        resize = transform.transforms[0]
        images = torch.from_numpy(np.stack([np.asarray(resize(picture)) for picture, _ in samples]))
    return [images, *(torch.stack([extras[name] for _, extras in pairs]) for name in model.method.test_inputs)]


def _program(feature: FeatureGraph, inputs: Mapping[str, Tensor]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        # PyTorch 2.6 takes no dimension without an upper limit.
        batch = {0: torch.export.Dim("N", min=1, max=2**31 - 1)}
        beside = (batch,) * (len(inputs) - 1)
        shapes = (batch, beside) if beside else (batch,)
        return torch.export.export(
            feature, tuple(tensor[:2] for tensor in inputs.values()), dynamic_shapes=shapes, strict=False
        )


def _write_onnx(program: torch.export.ExportedProgram, path: Path, names: Sequence[str]) -> Callable[..., Tensor]:
    """Write an ONNX file; what it computes, by onnxruntime."""
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        onnx = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=list(names), output_names=["feature"],
        )  # fmt: skip
        assert onnx is not None
        onnx.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(["feature"], given)[0])

    return call


def _write_program(program: torch.export.ExportedProgram, path: Path, _: Sequence[str]) -> Callable[..., Tensor]:
    """Write a program of torch.export; what it computes."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


_WRITERS = {"onnx": _write_onnx, "torch_export": _write_program}


def _compare(
    call: Callable[..., Tensor], inputs: Mapping[str, Tensor], expected: Mapping[int, Tensor], path: Path
) -> dict[str, Any]:
    """How far what a file computes is from what the model does; ValueError where it is too far."""
    differences, cosines = [], []
    for n, feature in expected.items():
        with torch.no_grad():
            found = call(*(tensor[:n] for tensor in inputs.values()))
        if found.shape != feature.shape:
            raise ValueError(
                f"{path}: gives {list(found.shape)} for {n} images, where PyTorch gives {list(feature.shape)}"
            )
        differences.append((found - feature).abs().max())
        cosines.append(nn.functional.cosine_similarity(found.double(), feature.double()).min())
    difference = float(torch.stack(differences).max())  # NaN where one is
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"{path}: differs from PyTorch by {difference:.1e}; allowed is {_TOLERANCE}; nothing was written"
        )
    return {"batches": list(expected), "max_difference": difference, "min_cosine": float(torch.stack(cosines).min())}


def _about(model: TrainedModel, image_input: str, inputs: Mapping[str, Tensor], feature: Tensor) -> dict[str, Any]:
    """What somebody who has but the file needs to know."""
    how, (images, *beside) = model.preprocessing, inputs.values()
    return {
        "checkpoint": str(model.checkpoint),
        "step": model.step,
        "method": model.config.method.name,
        "images": {
            "dtype": image_input, "shape": ["N", *images.shape[1:]], "colours": "RGB", "resize": "bicubic, antialiased",
            "mean": list(how.mean), "std": list(how.std), "normalised_inside": image_input == "uint8",
        },
        "extras": {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": ["N", *tensor.shape[1:]]}
            for name, tensor in zip(model.method.test_inputs, beside, strict=True)
        },
        "feature": {"shape": ["N", feature.shape[1]], "flip": how.flip, "normalised": how.normalize},
        "torch": torch.__version__,
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
