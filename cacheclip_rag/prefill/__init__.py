"""From a prompt to its KV and the logits of its last token."""
