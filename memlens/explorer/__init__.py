"""Explore sequences one by one: live in Jupyter, or as a static page.

`explore` returns an `Explorer` on a model. `explore_sequences` measures what it shows, and `write_explorer`
writes a page of it.
"""
