"""A model of transformers: its forward over a canvas, its tokenizer, and whether its KV can be composed."""
