"""Environment of every test run; set before anything imports torch or vLLM, and overridable from outside."""

import os

QUIET_CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # on a shared machine two spinning OpenMP threads are many times slower than one
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default asks for nearly all memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the test's process: traceable, no start-up per engine
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local Ray listens on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
}

for name, value in QUIET_CPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
