"""Helpers and scripts that ship with the package: ``accelerate test`` launches one of them."""
