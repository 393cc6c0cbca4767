"""The worker: claims jobs; one file for each job kind."""
