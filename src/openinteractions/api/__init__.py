"""What every route shares: authentication, request scope, errors on the wire, bodies, pages."""
