"""sedd-nets."""
