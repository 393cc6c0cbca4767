"""A browser in the sandbox."""
