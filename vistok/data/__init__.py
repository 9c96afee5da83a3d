"""Data: folders of images, webdataset shards, and the lab world `vistok.data.shapes`."""

from __future__ import annotations
