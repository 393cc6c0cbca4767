"""The kinds of disks that environments can have. All of it blocks: `disk.py` runs it in threads."""
