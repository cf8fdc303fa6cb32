"""Workers of one machine: rendezvous on loopback, the worker group, the elastic agent, reaping, failure reports."""

from __future__ import annotations
