"""What every route shares: authentication, request scope, errors on the wire, bodies, pages."""

from openinteractions.api import names

assert names, "paths with its words are made wherever the rest is used"
