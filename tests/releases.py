"""What tests need to know of the vLLM that is installed."""

import vllm

SINCE_33 = not vllm.__version__.startswith("0.32.")
