"""Cluster environment: launchers' variables, SLURM, network, rendezvous, error files. Only the rendezvous imports torch."""

from __future__ import annotations
