"""How good a model is: perplexity and latency, and the slim language model against the dense one.

Here are the numbers (`perplexity`, `timing`, `compare`), their table, and conditions that end a
run. `graphprune.measure` takes them of whole models.
"""
