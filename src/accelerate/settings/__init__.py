"""Typed settings, read once: environment, options, enumerations, plugins. Nothing here imports torch at module level."""
