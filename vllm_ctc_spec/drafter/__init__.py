"""The drafter: its configuration, its module, how its frames spell labels. No vLLM here."""
