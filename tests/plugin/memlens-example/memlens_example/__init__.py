"""An example of a package that extends memlens: a metric, an instrument, a figure, a reader, a localizer and a study."""
