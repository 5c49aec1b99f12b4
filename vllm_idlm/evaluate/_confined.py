"""Runs a program after giving up what it must not have; started by `sandbox`, never imported.

    python -I -S -B _confined.py PROGRAM MEMORY SECONDS

In this order: no new privileges, no network (a network namespace of its own, and a filter that refuses sockets and new
processes), no writing outside the working directory where the kernel has Landlock, the user "nobody" if we are root,
limits on memory, processor time, file size and processes. Exit status 97: it could not be confined, and was not run.
"""

import contextlib
import ctypes
import os
import platform
import resource
import struct
import sys

NOT_CONFINED = 97
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_CALLS = {  # socket, io_uring_setup, clone3, clone, (fork, vfork); the audit architecture
    "x86_64": ((41, 425, 435, 56, 57, 58), 0xC000003E),
    "aarch64": ((198, 425, 435, 220), 0xC00000B7),
}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITING = 0x1FF2  # Landlock's rights (ABI 1) but execute, read file and read directory
_libc = ctypes.CDLL(None, use_errno=True)


def _without_network() -> bool:
    """A network namespace with nothing in it, with a user namespace if that is what it takes."""
    return any(_libc.unshare(flags) == 0 for flags in (_NEWNET, _NEWNET | _NEWUSER))


def _refuse(calls: tuple[int, ...], audit: int) -> bool:
    """A seccomp filter: these system calls fail with EPERM, a foreign architecture is killed."""

    def op(code: int, jt: int, jf: int, k: int) -> bytes:
        return struct.pack("HBBI", code, jt, jf, k)

    load, equal, ret = 0x20, 0x15, 0x06
    tests = [op(equal, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    program = b"".join([
        op(load, 0, 0, 4), op(equal, 1, 0, audit), op(ret, 0, 0, 0),
        op(load, 0, 0, 0), *tests, op(ret, 0, 0, 0x7FFF0000), op(ret, 0, 0, 0x00050000 | 1),
    ])  # fmt: skip
    code = ctypes.create_string_buffer(program)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    return _libc.prctl(_SET_SECCOMP, _FILTER, filter_, 0, 0) == 0


def _without_calls() -> bool:
    """No sockets, no other processes, by a filter; False where it cannot be set."""
    found = _CALLS.get(platform.machine())
    return found is not None and _refuse(*found)


def _read_only() -> None:
    """Landlock, where the kernel has it: writing beneath the working directory only."""
    rights = ctypes.create_string_buffer(struct.pack("Q", _WRITING))
    rules = _libc.syscall(_LANDLOCK_CREATE, rights, 8, 0)
    if rules < 0:
        return
    here = os.open(".", os.O_PATH)
    beneath = ctypes.create_string_buffer(struct.pack("=Qi", _WRITING, here))
    _libc.syscall(_LANDLOCK_ADD, rules, 1, beneath, 0)
    _libc.syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    os.close(here)


def _open_to_all(file: str) -> bool:
    """Whether another user may read `file`: nobody could import nothing from a Python below /root."""
    path = os.path.realpath(file)
    found = bool(os.stat(path).st_mode & 0o004)
    while (path := os.path.dirname(path)) != "/":
        found = found and bool(os.stat(path).st_mode & 0o001)
    return found


def _confine(memory: int, seconds: int) -> bool:
    """Whether the network is gone; the rest as far as the system has it."""
    _libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if not any([_without_network(), _without_calls()]):  # both where both can be had
        return False
    _read_only()
    if os.getuid() == 0 and _open_to_all(os.__file__):
        with contextlib.suppress(OSError):  # root of a user namespace alone has no other user to be
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    limits = {
        resource.RLIMIT_AS: memory, resource.RLIMIT_CPU: seconds, resource.RLIMIT_FSIZE: 1 << 20,
        resource.RLIMIT_CORE: 0, resource.RLIMIT_NPROC: 0,
    }  # fmt: skip
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    return True


def main() -> None:
    """Read the program while it can be read, confine, run."""
    file, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with open(file, encoding="utf-8") as source:
        program = source.read()
    if not _confine(memory, seconds):
        sys.exit(NOT_CONFINED)
    sys.argv = ["program"]
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
