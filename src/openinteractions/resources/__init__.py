"""The control plane: one folder for each REST resource: routes, service, store, schemas."""
