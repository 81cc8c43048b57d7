"""Tool calls as a model's template writes them, and decoding that a JSON schema constrains."""
