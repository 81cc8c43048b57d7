"""Online: how the question, and what is recomputed, weighs the context. One way a file."""
