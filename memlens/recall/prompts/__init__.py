"""How little of the prompt is enough: extraction curves, compression, deletion."""
