"""The way out of a sandbox: which hosts it may reach, and what is added on the way."""
