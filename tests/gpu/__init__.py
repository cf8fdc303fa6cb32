"""Checks of the paths that only a GPU takes: ``make gpu``. Without a GPU they run small, on the CPU, to check themselves."""
