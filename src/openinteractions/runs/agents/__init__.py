"""Agents: what their ids stand for, and what they are told."""
