"""Studies end to end: from a model and sequences to a folder of results with a report."""

from memlens.studies.localization import LocalizedRun, LocalizeOptions, localize

__all__ = ["LocalizeOptions", "LocalizedRun", "localize"]
