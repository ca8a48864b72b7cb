"""Tables, sections and claims of the comparative study."""
