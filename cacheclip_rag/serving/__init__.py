"""Everything between requests and the model that is not prefill: who runs when, decoding, counting."""
