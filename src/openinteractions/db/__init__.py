"""PostgreSQL: every table on one page, the engine, and the embedded server."""
