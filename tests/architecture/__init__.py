"""The rules of ARCHITECTURE.md, checked. Each check is itself shown to catch a bad example."""
