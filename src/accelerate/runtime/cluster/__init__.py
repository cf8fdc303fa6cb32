"""This process's place in the cluster: environment variables, SLURM, network, rendezvous, error files. Imports no torch."""

from __future__ import annotations
