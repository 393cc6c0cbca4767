"""What drives the browser, inside the sandbox: one action for each run of it.

Its source is an argument of the command (`tools/browser/tool.py`), so these files use the standard
library and each other only, and run on Python 3.11.
"""
