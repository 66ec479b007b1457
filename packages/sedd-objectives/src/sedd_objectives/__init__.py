"""sedd-objectives."""
