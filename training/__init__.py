"""Training from a checkout; not installed with the library."""
