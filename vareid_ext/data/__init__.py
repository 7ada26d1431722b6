"""Data: readers, viewpoint labels, the synthetic set, sampling and augmentation."""

from vareid_ext.data.synthetic import SyntheticSettings, synthetic_data
from vareid_ext.data.types import UNKNOWN, VIEWPOINTS, ImageList, ReidData

__all__ = ["UNKNOWN", "VIEWPOINTS", "ImageList", "ReidData", "SyntheticSettings", "synthetic_data"]
