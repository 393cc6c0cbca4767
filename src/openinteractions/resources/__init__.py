"""The control plane: one folder for each REST resource, always routes / service / store / schemas."""
