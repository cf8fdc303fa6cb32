"""Bytes on disk or at a URL: staging, checksums, the manifest, and the atomic rename that commits a checkpoint."""

from __future__ import annotations
