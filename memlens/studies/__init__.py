"""Studies end to end: from a model and sequences to a folder of results with a report."""

from memlens.studies.attention_bypass import study_attention_bypass
from memlens.studies.bypass_options import BypassInputs, BypassOptions
from memlens.studies.comparative import study_comparative
from memlens.studies.comparative_config import StudyModel
from memlens.studies.comparative_options import ComparativeOptions
from memlens.studies.idiom_options import IdiomOptions
from memlens.studies.idioms import study_idioms
from memlens.studies.localization import LocalizeOptions, localize
from memlens.studies.running import StudyRun

__all__ = [
    "BypassInputs",
    "BypassOptions",
    "ComparativeOptions",
    "IdiomOptions",
    "LocalizeOptions",
    "StudyModel",
    "StudyRun",
    "localize",
    "study_attention_bypass",
    "study_comparative",
    "study_idioms",
]
