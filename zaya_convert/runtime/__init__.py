"""The reference runtime: the whole forward pass of ZAYA1 in plain torch, and what surrounds it.

``model`` runs a checkpoint, ``cache`` carries its three states, ``tokenizer`` and ``generate``
turn text into tokens and tokens into text. fp32 is the oracle everything else is compared with.
"""
