"""System: installed packages, hardware, untrusted file names, page cache."""

from __future__ import annotations
