"""The contract's value types: content, steps, tools, requests, usage and stream events.

Nothing in here knows a database, a model or HTTP: it reads JSON, refuses what is wrong with a
message for the caller, and hands on plain dictionaries of one normal form.
"""
