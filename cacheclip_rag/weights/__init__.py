"""Model weights by name: fetched, converted, and verified on this machine."""
