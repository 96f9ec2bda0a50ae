"""How the bundled checkpoint `zaya1-tiny` is made: its task, tokenizer, training and evaluation."""
