"""An example of a package that extends memlens: a metric, an instrument, a figure, a reader and a study."""
