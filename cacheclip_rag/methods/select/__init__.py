"""Online: which context tokens are worth recomputing. One selector a file."""
