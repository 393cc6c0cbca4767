"""OpenInteractions: a self-hosted, vendor-neutral server for the Interactions API."""

__version__ = "0.1.0"
