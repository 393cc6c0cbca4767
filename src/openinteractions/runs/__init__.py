"""Drives one interaction under a lease: load, loop, commit, emit."""
