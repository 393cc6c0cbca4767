"""Stored secrets that the egress proxy adds, and that no sandbox ever sees."""
