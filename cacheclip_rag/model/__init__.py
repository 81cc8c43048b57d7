"""A model of transformers: its forward over a canvas, its tokenizer, and checks that its KV can be composed."""
