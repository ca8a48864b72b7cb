"""The example is a package of its own: `tests/test_extending.py` installs it and uses it from outside."""

collect_ignore = ["memlens-example"]
