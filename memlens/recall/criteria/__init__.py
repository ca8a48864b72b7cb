"""Can the sequence only be recalled, or could it also be inferred?"""
