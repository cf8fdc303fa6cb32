"""Scripts to be launched."""
