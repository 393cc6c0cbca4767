"""Tools that this server runs itself: what a model calls, and what comes of it."""
