"""The labeled array that every analysis returns, its statistics and its file format.

`Result` wraps an `xarray.Dataset` with one value per sequence and site; nothing is averaged in advance.
`load_result` reads the files of `Result.save`. `compare_groups` compares two results (memorized sequences and
controls), and `overlay` draws several in one figure.
"""
