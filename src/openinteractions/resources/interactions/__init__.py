"""`/interactions`: create, read, list, stream, cancel, delete."""
