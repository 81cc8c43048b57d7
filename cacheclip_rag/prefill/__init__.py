"""Prefill: from a prompt to its KV and the logits of its last token, by one of several strategies."""
