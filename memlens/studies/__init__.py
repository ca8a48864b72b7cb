"""Studies end to end: from a model and sequences to a folder of results with a report."""

from memlens.studies.localization import LocalizeOptions, localize
from memlens.studies.running import StudyRun

__all__ = ["LocalizeOptions", "StudyRun", "localize"]
