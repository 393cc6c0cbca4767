"""Environments: sandboxes with files, and the files themselves."""
