"""An example of a package that extends memlens, with one module per thing that can be added."""
