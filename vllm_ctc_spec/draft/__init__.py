"""Where drafts come from. No vLLM here: serving, evaluation, benchmarks and checks draft by the same code."""
