"""The files of environments, worked on from the host: see `tree.Tree`."""
