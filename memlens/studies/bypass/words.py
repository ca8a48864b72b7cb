"""What the report of the attention-bypass study says of its sections."""

from __future__ import annotations

LEAD = (
    "The attention of a block is bypassed when every token attends to itself alone: values and the output "
    "projection stay, nothing moves between tokens. What recitation loses is set against what other text and "
    "other tasks lose, and against the same edit of untrained weights."
)
BLOCKS_LEAD = (
    "One block at a time, teacher-forced: a sequence is recited exactly when the arg-max is right at every "
    "position of its continuation. Token accuracy is teacher-forced here; entropy is summed over the "
    "continuation's steps."
)
BALANCE_NOTE = (
    "Standardized mean differences, memorized less control, against all candidates (before) and the chosen "
    "ones (after); below 0.1 in size is commonly called balanced. No text that is not recited is as probable "
    "as text that is, so the log-probability is matched in part only."
)
TASKS_LEAD = (
    "The same bypasses on benchmark tasks. A group's value is the mean over its tasks. Relative drops are "
    "given "
    "raw and corrected for chance: raw, a two-way task can hardly lose more than half of its accuracy."
)
FRONTIER_LEAD = (
    "Each dot is the model with the attention of one block bypassed. A selective bypass lies low (little is "
    "recited) and as far right as the unchanged model (nothing else is lost)."
)
SELECTIVITY_NOTE = (
    "removed: share of recitation that goes. cost: share of accuracy above chance that goes, on the task "
    "that "
    "loses most (or the mean over tasks, as set). selectivity: removed less cost. selectivity_chosen is "
    "measured on one half of sequences and questions, everything else on the other."
)
SETS_LEAD = (
    "Several blocks bypassed together. All sets are chosen on one half of sequences and questions; the "
    "tables "
    "give what they do on the other half."
)
EDITS_LEAD = (
    "What else can be done to a layer, on the same sequences: attention that adds nothing (zero) or its "
    "mean, "
    "that looks at all earlier tokens alike (uniform) or at the first one only (first_token), and the MLP "
    "zeroed or replaced by its mean."
)
CONTROLS_NOTE = (
    "Change of the target log-probability in nats a token, negative is harm; `minus …` is memorized text "
    "less "
    "its matched control. What is recited has near-certain tokens and so more to lose than text of lower "
    "probability: the predictable text, matched on that in part, is the fairer control."
)
DEPTH_NOTE = (
    "Rank correlation over layers of the effect's mean absolute size with depth. Where untrained weights "
    "show "
    "it too, it is a fact of residual stacks and says nothing of memorization."
)
BOUNDS_LEAD = (
    "How far a bypass can move the block's output, from what attention and weights are, beside how far it "
    "does. "
    "Bounds are memlens' own; no published theorem is quoted."
)
