"""Landlock: a process gives up every file but those it names, without privileges (Linux 5.13).

All rights that the running kernel knows are handled, so everything not granted here is denied:
writing, executing, TCP ports, device ioctls, abstract sockets and signals to processes outside.
Landlock does not cover changes of mode, owner, times and extended attributes; `seccomp.py` and
read-only mounts do.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

from sparring.rewards.sandbox.syscalls import Kernel

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

_READ = _READ_FILE | _READ_DIR


def abi(kernel: Kernel) -> int:
    """The version of Landlock that the kernel offers; 0 where it has none or it is switched off."""
    try:
        return kernel.call("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(
    kernel: Kernel, *, readable: Iterable[str], read_write: Iterable[str], writable: Iterable[str]
) -> int:
    """Keep only these paths for this process and its children, and return the ABI that was used.

    readable: read files and list directories below. read_write: single files such as /dev/null.
    writable: everything but device nodes, sockets and execution below. A path that does not exist
    is passed over. Raises OSError where the kernel has no Landlock; needs NO_NEW_PRIVS.
    """
    version = abi(kernel)
    if version < 1:
        raise OSError("the kernel has no Landlock, or it is switched off")
    files = (1 << 13) - 1
    if version >= 2:
        files |= _REFER
    if version >= 3:
        files |= _TRUNCATE
    if version >= 5:
        files |= _IOCTL_DEV
    network = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0
    attributes = struct.pack("=Q", files)
    if version >= 4:
        attributes += struct.pack("=Q", network)
    if version >= 6:
        attributes += struct.pack("=Q", scopes)
    ruleset = kernel.call(
        "landlock_create_ruleset",
        ctypes.create_string_buffer(attributes, len(attributes)),
        len(attributes),
        0,
    )
    try:
        for path in readable:
            _allow(kernel, ruleset, path, files & _READ)
        for path in read_write:
            _allow(kernel, ruleset, path, files & (_READ_FILE | _WRITE_FILE))
        everything = files & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV)
        for path in writable:
            _allow(kernel, ruleset, path, everything)
        kernel.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _allow(kernel: Kernel, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, descriptor)
        buffer = ctypes.create_string_buffer(rule, len(rule))
        kernel.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, buffer, 0)
    finally:
        os.close(descriptor)
