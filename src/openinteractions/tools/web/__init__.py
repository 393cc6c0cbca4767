"""Tools that reach the web from outside the sandbox: `google_search` and `url_context`."""
