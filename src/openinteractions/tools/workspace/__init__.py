"""Tools on the files of a run's environment."""
