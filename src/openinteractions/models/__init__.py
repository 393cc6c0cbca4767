"""Models: the port, the catalog of IDs, and one adapter for each vendor's wire format."""
