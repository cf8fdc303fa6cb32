"""A script that mypy and pyright check: types pass through `prepare` and what goes with it."""
