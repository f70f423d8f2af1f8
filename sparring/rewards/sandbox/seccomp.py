"""The seccomp filter: which system calls a program may make, as classic BPF built by hand.

Allowed is what an ordinary computation needs. Refused with EPERM is every way to other processes,
to the network, to the kernel's interior and to other programs; `clone3` answers ENOSYS, so that
libc falls back to `clone`, whose flags a filter can read. Calls newer than the table answer ENOSYS.
Without namespaces the filter also replaces what they would have hidden: signals, limits and
priorities of other processes, and modes, owners and times of files.

A call under another architecture's convention kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from sparring.rewards.sandbox.syscalls import (
    AUDIT_ARCH,
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWTIME,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    HIGHEST_KNOWN,
    PR_SET_SECCOMP,
    Kernel,
    numbers,
)

_MODE_FILTER = 2
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LD_WORD, _JUMP_EQUAL, _JUMP_GREATER, _AND, _RETURN = 0x20, 0x15, 0x25, 0x54, 0x06

_DENIED = """
unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick
mount_setattr ptrace process_vm_readv process_vm_writev kcmp process_madvise process_mrelease
pidfd_open pidfd_getfd pidfd_send_signal bpf perf_event_open add_key request_key keyctl
io_uring_setup io_uring_enter io_uring_register userfaultfd name_to_handle_at open_by_handle_at
init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff mknod
mknodat execve execveat socket connect bind listen accept accept4 shmget shmat shmctl msgget msgsnd
msgrcv msgctl semget semop semctl semtimedop mq_open mq_unlink quotactl quotactl_fd acct
settimeofday clock_settime adjtimex clock_adjtime syslog sethostname setdomainname iopl ioperm
modify_ldt vhangup fanotify_init inotify_init inotify_init1 migrate_pages move_pages mbind
set_mempolicy set_mempolicy_home_node memfd_create memfd_secret lookup_dcookie nfsservctl uselib
sysfs ustat
"""

_DENIED_WITHOUT_NAMESPACES = """
tkill rt_sigqueueinfo rt_tgsigqueueinfo ioprio_set setsid setpgid chmod fchmod fchmodat chown fchown
lchown fchownat utime utimes futimesat utimensat setxattr lsetxattr fsetxattr removexattr
lremovexattr fremovexattr truncate
"""

_NEW_NAMESPACES = (
    CLONE_NEWTIME
    | CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET
)
_F_SETOWN, _F_SETOWN_EX = 8, 15
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF


def _statement(code: int, value: int) -> bytes:
    return struct.pack("=HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _statement(_RETURN, _ERRNO | number)


def _load_argument(index: int) -> bytes:
    return _statement(_LD_WORD, 16 + 8 * index)  # its low half: all is little-endian


def _on_call(number: int, body: list[bytes]) -> list[bytes]:
    """`body` for this call alone; it must end every path with a return."""
    return [_jump(_JUMP_EQUAL, number, 0, len(body)), *body]


def _only(argument: int, allowed: tuple[int, ...]) -> list[bytes]:
    """Allow the call where the argument is one of these values, else EPERM."""
    checks = [
        _jump(_JUMP_EQUAL, value, len(allowed) - index, 0) for index, value in enumerate(allowed)
    ]
    return [
        _load_argument(argument),
        *checks,
        _refuse(errno.EPERM),
        _statement(_RETURN, _ALLOW),
    ]


def _without_namespaces(table: dict[str, int], pid: int) -> list[bytes]:
    """What a PID and a mount namespace would have hidden; `pid` is the program's own process."""
    program: list[bytes] = []
    for name in ("kill", "tgkill"):
        program += _on_call(table[name], _only(0, (pid,)))
    for name in ("prlimit64", "sched_setattr", "sched_setparam", "sched_setscheduler"):
        program += _on_call(table[name], _only(0, (0, pid)))
    program += _on_call(table["sched_setaffinity"], _only(0, (0, pid)))
    program += _on_call(
        table["setpriority"],
        [_load_argument(0), _jump(_JUMP_EQUAL, 0, 1, 0), _refuse(errno.EPERM), *_only(1, (0, pid))],
    )
    program += _on_call(
        table["fcntl"],
        [
            _load_argument(1),
            _jump(_JUMP_EQUAL, _F_SETOWN, 1, 0),
            _jump(_JUMP_EQUAL, _F_SETOWN_EX, 0, 1),
            _refuse(errno.EPERM),
            _statement(_RETURN, _ALLOW),
        ],
    )
    return program


def build_filter(machine: str, *, namespaces: bool, pid: int) -> bytes:
    """The filter's instructions for this architecture.

    namespaces: whether PID and mount namespaces already hide other processes and files. pid: the
    program's process number, the one that it may signal where they do not. Raises OSError for an
    architecture without a table of numbers.
    """
    table = numbers(machine)
    program = [
        _statement(_LD_WORD, 4),
        _jump(_JUMP_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _statement(_RETURN, _KILL_PROCESS),
        _statement(_LD_WORD, 0),
        _jump(_JUMP_GREATER, HIGHEST_KNOWN, 0, 1),  # x32's numbers lie above, too
        _refuse(errno.ENOSYS),
    ]
    program += _on_call(table["clone3"], [_refuse(errno.ENOSYS)])
    denied = _DENIED if namespaces else _DENIED + _DENIED_WITHOUT_NAMESPACES
    for name in denied.split():
        if name in table:
            program += _on_call(table[name], [_refuse(errno.EPERM)])
    program += _on_call(
        table["clone"],
        [
            _load_argument(0),
            _statement(_AND, _NEW_NAMESPACES),
            _jump(_JUMP_EQUAL, 0, 1, 0),
            _refuse(errno.EPERM),
            _statement(_RETURN, _ALLOW),
        ],
    )
    # An event loop wakes itself through a pair of connected stream sockets; they lead nowhere.
    program += _on_call(
        table["socketpair"],
        [
            _load_argument(0),
            _jump(_JUMP_EQUAL, _AF_UNIX, 1, 0),
            _refuse(errno.EPERM),
            _load_argument(1),
            _statement(_AND, _SOCK_TYPE_MASK),
            _jump(_JUMP_EQUAL, _SOCK_STREAM, 1, 0),
            _refuse(errno.EPERM),
            _statement(_RETURN, _ALLOW),
        ],
    )
    if not namespaces:
        program += _without_namespaces(table, pid)
    program.append(_statement(_RETURN, _ALLOW))
    return b"".join(program)


def install(kernel: Kernel, *, namespaces: bool) -> None:
    """Apply the filter to this process, for good. Needs NO_NEW_PRIVS; raises OSError."""
    code = build_filter(kernel.machine, namespaces=namespaces, pid=os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    kernel.prctl(PR_SET_SECCOMP, ctypes.create_string_buffer(header, len(header)), _MODE_FILTER)
