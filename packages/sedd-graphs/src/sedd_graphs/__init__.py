"""sedd-graphs."""
