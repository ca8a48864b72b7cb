"""The labeled array every analysis returns, its statistics and its file.

`Result` wraps an `xarray.Dataset` with one value per sequence and site; nothing is averaged away before it
is asked for. `load_result` reads what `Result.save` wrote. `compare_groups` sets two results against each
other (memorized against controls), and `overlay` draws several in one figure.
"""
