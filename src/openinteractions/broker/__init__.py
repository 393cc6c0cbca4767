"""The broker process: the only program that talks to the container engine."""
