"""What may have been memorized: sequences, their readers, checks and controls."""

from memlens.sequences.checks import SequenceReport, check_sequences
from memlens.sequences.controls import corrupt
from memlens.sequences.knowledge import fact_sequences, identifier_sequences
from memlens.sequences.natural import natural_controls, text_ids, text_windows
from memlens.sequences.readers import load_sequences
from memlens.sequences.set import SequenceSet

__all__ = [
    "SequenceReport",
    "SequenceSet",
    "check_sequences",
    "corrupt",
    "fact_sequences",
    "identifier_sequences",
    "load_sequences",
    "natural_controls",
    "text_ids",
    "text_windows",
]
