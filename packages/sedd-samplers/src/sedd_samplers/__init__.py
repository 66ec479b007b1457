"""sedd-samplers."""
