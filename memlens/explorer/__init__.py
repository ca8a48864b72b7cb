"""Look into sequences one by one: live in Jupyter, or as a static page.

`explore` gives an `Explorer` on a model. `explore_sequences` measures what it shows, `explorer_payload` makes
a JSON object of it for the report, and `write_explorer` a page of its own.
"""
