"""Data: readers, viewpoint labels, the synthetic set, sampling and augmentation."""

from vareid_ext._text import VIEWPOINTS
from vareid_ext.data.dataset import Batch, ReidDataset, collate, worker_init
from vareid_ext.data.export import write_manifest
from vareid_ext.data.extra_files import FORMATS, ExtraFiles, check_given, join_extras
from vareid_ext.data.extras import BODY_PAIRS, EXTRAS, SURFACE_PAIRS, Extra, with_extra
from vareid_ext.data.load import check_readable, load_data
from vareid_ext.data.readers import READERS, check_kind, renders_extras
from vareid_ext.data.readers.dividing import DivisionSettings
from vareid_ext.data.readers.manifest import read_manifest
from vareid_ext.data.readers.synthetic import synthetic_data
from vareid_ext.data.sampler import BatchSampler, Draw, PKSampler, ShuffledSampler
from vareid_ext.data.synthetic.renderer import SyntheticSettings
from vareid_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD, build_transform, check_normalisation
from vareid_ext.data.types import UNKNOWN, ImageList, ReidData
from vareid_ext.data.viewpoint_classes import ViewpointClasses, declared_classes
from vareid_ext.data.viewpoints import ViewpointLabels, label_images, read_viewpoint_labels, with_soft_labels

__all__ = [
    "BODY_PAIRS",
    "EXTRAS",
    "FORMATS",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "READERS",
    "SURFACE_PAIRS",
    "UNKNOWN",
    "VIEWPOINTS",
    "Batch",
    "BatchSampler",
    "DivisionSettings",
    "Draw",
    "Extra",
    "ExtraFiles",
    "ImageList",
    "PKSampler",
    "ReidData",
    "ReidDataset",
    "ShuffledSampler",
    "SyntheticSettings",
    "ViewpointClasses",
    "ViewpointLabels",
    "build_transform",
    "check_given",
    "check_kind",
    "check_normalisation",
    "check_readable",
    "collate",
    "declared_classes",
    "join_extras",
    "label_images",
    "load_data",
    "read_manifest",
    "read_viewpoint_labels",
    "renders_extras",
    "synthetic_data",
    "with_extra",
    "with_soft_labels",
    "worker_init",
    "write_manifest",
]
