"""CTC speculative decoding for vLLM: one parallel draft forward, exact verification."""

__version__ = "0.1.0"
