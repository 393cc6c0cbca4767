"""Callbacks: what is sent, how it is signed, and the keys that prove it."""
