"""sedd-train."""
