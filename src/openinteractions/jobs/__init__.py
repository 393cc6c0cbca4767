"""The lease queue: durable jobs in PostgreSQL, owned by one live worker at a time."""
