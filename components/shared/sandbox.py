"""Run code that a model wrote: a process that can compute, and can do nothing else.

The child imports what answers commonly use, limits its time and memory, then installs a seccomp filter (Linux;
seccomp(2)) that allows the system calls of a computation and answers all others with "not permitted": no network, no
process, no file, no signal. It needs no privilege and works inside containers. What is expected never enters it: it
gets code and calls and returns values, so code that leaves early, forges its output or overrides `==` gains nothing.

This file is also the child's program, run as `python -I -S sandbox.py`: at its top it imports nothing of ours.
"""

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

LONGEST_OUTPUT = 2**20
"""Bytes that code may print, results included; more ends it."""

MODULES = (
    *("bisect", "collections", "copy", "datetime", "decimal", "enum", "fractions", "functools", "heapq", "itertools"),
    *("json", "math", "operator", "random", "re", "statistics", "string", "typing"),
)
"""What code may import; any other module would have to be read from a file."""
ALLOWED = {
    # read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn ioctl mremap
    # madvise exit gettimeofday sigaltstack futex clock_gettime clock_getres exit_group getrandom
    "x86_64": (
        0xC000003E,
        (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 25, 28, 60, 96, 131, 202, 228, 229, 231, 318),
    ),
    "aarch64": (
        0xC00000B7,
        (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 29, 216, 233, 93, 169, 132, 98, 113, 114, 94, 278),
    ),
}
"""By processor: what seccomp calls it, and the numbers of the system calls that are allowed (Linux's tables)."""


def check() -> None:
    """Make sure that code can be confined here.

    Raises:
        TrainingError: It cannot: another system than Linux, another processor, or a kernel without seccomp.
    """
    from ..contracts.errors import TrainingError

    if run("def probe(): return open('/proc/self/stat')", ["1 + 1", "probe()"], seconds=5, memory_mb=256) != [2, None]:
        raise TrainingError(
            "this machine cannot confine code that a model writes, so it is not run",
            where="a reward of kind tests",
            fix=f"train on Linux on one of {sorted(ALLOWED)}, with a kernel that has seccomp",
        )


def run(code: str, calls: Sequence[str], seconds: float, memory_mb: int) -> list[Any] | None:
    """Return the value of each call after the code has run, as JSON has it; None in place of one that failed.

    None is returned for all where the code cannot run, ends by itself, prints without end, or takes too long or too
    much memory.

    Args:
        code: Python.
        calls: Expressions.
        seconds: Of processor time, and of the clock, for all of it.
        memory_mb: Address space; Python itself takes about 30.
    """
    job = json.dumps({"code": code, "calls": list(calls), "seconds": seconds, "memory": memory_mb * 2**20})
    command = [sys.executable, "-I", "-S", "-B", __file__]
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command, input=job.encode(), stdout=output, stderr=subprocess.DEVNULL, timeout=seconds + 5, env={}
            )
        except subprocess.TimeoutExpired:
            return None
        output.seek(0)
        text = output.read()
    if done.returncode:
        return None
    try:
        found = json.loads(text.rpartition(b"\n")[2], parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and len(found) == len(calls) else None


def _child() -> None:
    job = json.loads(sys.stdin.buffer.read())
    for module in MODULES:
        __import__(module)
    _limit(job["seconds"], job["memory"])
    _confine()
    dump, write, flush = json.dumps, sys.stdout.write, sys.stdout.flush
    names: dict[str, Any] = {"__name__": "answer"}
    exec(compile(job["code"], "<answer>", "exec"), names)
    results = []
    for call in job["calls"]:
        try:
            results.append(json.loads(dump(eval(call, names))))
        except Exception:
            results.append(None)
    write("\n" + dump(results))
    flush()


def _limit(seconds: float, memory: int) -> None:
    import resource
    import signal

    whole = max(1, round(seconds + 0.5))
    for what, most in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, LONGEST_OUTPUT),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process: SIGALRM has no handler


def _confine() -> None:
    """Install the filter; once it is there, nothing removes it.

    Raises:
        OSError: The kernel refuses.
        KeyError: The processor is none of `ALLOWED`.
    """
    import ctypes
    import struct

    if sys.platform != "linux":
        raise ValueError("Linux is needed")
    kind, calls = ALLOWED[platform.machine()]
    load, equal, give, allow, refuse = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050001  # the last: an error, EPERM
    number, architecture = 0, 4  # offsets in struct seccomp_data
    rows = [(load, 0, 0, architecture), (equal, 1, 0, kind), (give, 0, 0, refuse), (load, 0, 0, number)]
    for call in calls:
        rows += [(equal, 0, 1, call), (give, 0, 0, allow)]
    rows.append((give, 0, 0, refuse))
    program = b"".join(struct.pack("HBBI", *row) for row in rows)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    for arguments in ((no_new_privileges, 1, 0, 0, 0), (set_seccomp, filter_mode, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    _child()
