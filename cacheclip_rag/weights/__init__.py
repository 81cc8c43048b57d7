"""Model weights by name: download, conversion, and records of verification on this machine."""
