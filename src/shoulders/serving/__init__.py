"""One frozen LM in memory, many skills served at once."""
