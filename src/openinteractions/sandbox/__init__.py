"""Sandboxes: the port, its backends, the pipe into them, their disks, files and way out."""
