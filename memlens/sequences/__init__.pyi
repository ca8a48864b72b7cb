from .checks import SequenceReport as SequenceReport
from .checks import check_sequences as check_sequences
from .natural import natural_controls as natural_controls
from .readers.idioms import idiom_defects as idiom_defects
from .readers.knowledge import fact_sequences as fact_sequences
from .readers.knowledge import identifier_sequences as identifier_sequences
from .readers.load import load_sequences as load_sequences
from .set import SequenceSet as SequenceSet
