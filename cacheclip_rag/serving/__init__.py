"""Serving: the lock, the limit on requests in flight, hints, decoding options, streaming and counters."""
