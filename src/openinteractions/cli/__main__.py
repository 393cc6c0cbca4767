"""`python -m openinteractions.cli`: the command, where its script is not at hand."""

from openinteractions.cli.main import main

main()
