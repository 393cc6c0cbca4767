"""The main process of a sandbox: starts commands, keeps their output, forwards connections.

Its source is sent over the pipe (`sandbox/pipe.py`), so these files use the standard library only
and run on Python 3.9.
"""
