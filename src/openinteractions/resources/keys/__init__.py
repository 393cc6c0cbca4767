"""API keys, projects and their budgets."""
