"""Coordination of launchers on several machines: static rendezvous, restart rounds, heartbeats."""

from __future__ import annotations
