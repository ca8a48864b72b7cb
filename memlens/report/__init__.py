"""One HTML file that says what was found, shows it, and tells how to do it again.

`write_report` makes the file from findings, sections and settings. `RunDirectory` keeps the results of a run
on disk as they come, and `report_from_directory` makes the report from such a folder at any time.
"""
