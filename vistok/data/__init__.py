"""Data: folders of images, webdataset shards, and the lab world `vistok.data.shapes`."""

from __future__ import annotations

from vistok.data.folders import ImageFolder
from vistok.data.shards import ShardDataset, write_shards

__all__ = ["ImageFolder", "ShardDataset", "write_shards"]
