"""The event log: what a stream shows, written once, read by any process at any position."""
