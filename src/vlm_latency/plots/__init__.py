"""Tables and statistics in, matplotlib figures out; one module per kind of figure."""
