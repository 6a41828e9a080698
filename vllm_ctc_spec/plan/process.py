"""One function in a process of its own, whose end gives back the memory of all that it loaded."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from vllm_ctc_spec.errors import TrainingError, UserError

Result = TypeVar("Result")


def in_own_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """What `function` returns there, or the UserError that it ends with. Anything else that goes wrong is a
    TrainingError, and the traceback is printed there. An interrupt ends the process."""
    spawn = multiprocessing.get_context("spawn")  # CUDA cannot be used in a fork
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_run, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        succeeded, outcome = receiver.recv()
    except EOFError as error:
        process.join()
        raise TrainingError(
            f"A process that measures ended with exit code {process.exitcode} before it was done; if the machine ran "
            "out of memory, give smaller --batch-sizes."
        ) from error
    except BaseException:  # an interrupt, above all: what it measures takes minutes
        process.terminate()
        raise
    finally:
        process.join()
    if not succeeded:
        raise outcome
    return outcome


def _run(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        outcome = True, function(*arguments)
    except KeyboardInterrupt:  # Ctrl-C reaches both processes, and the other one says so
        return
    except UserError as error:
        outcome = False, error
    except Exception as error:  # of any kind: vLLM and the model fail in their own code
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        outcome = False, TrainingError(f"A measurement failed ({type(error).__name__}: {reason}); see above for where.")
    sender.send(outcome)
