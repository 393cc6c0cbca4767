"""Custom agents: a base agent with a caller's instructions, tools and files, in versions."""
