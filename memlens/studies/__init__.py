"""Studies end to end: from a model and sequences to a folder of results with a report."""

from memlens.studies.idiom_options import IdiomOptions
from memlens.studies.idioms import study_idioms
from memlens.studies.localization import LocalizeOptions, localize
from memlens.studies.running import StudyRun

__all__ = ["IdiomOptions", "LocalizeOptions", "StudyRun", "localize", "study_idioms"]
