"""The command line: operate a server, and talk to one like any user."""
