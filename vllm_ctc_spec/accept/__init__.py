"""How a draft is accepted. No vLLM here: a rule marks edges of a tree, and one walk serves all rules."""
