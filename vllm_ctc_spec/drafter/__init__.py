"""What a drafter is: its configuration, its module, how its frames spell labels. No vLLM here."""
