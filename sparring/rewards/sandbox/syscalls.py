"""The system calls that Python does not offer, by ctypes, and their numbers on two architectures.

Numbers are those of the kernel's own headers (arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h). Nothing here is a policy: what is allowed is written in
`seccomp.py`, `landlock.py` and `namespaces.py`. Only the standard library is imported, for these
modules also run in the bare interpreter that becomes the fork server.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
AT_FDCWD = -100
AT_RECURSIVE = 0x8000

_X86_64 = """
unshare 272 setns 308 mount 165 umount2 166 pivot_root 155 chroot 161 move_mount 429 open_tree 428
fsopen 430 fsconfig 431 fsmount 432 fspick 433 mount_setattr 442 ptrace 101 process_vm_readv 310
process_vm_writev 311 kcmp 312 process_madvise 440 process_mrelease 448 pidfd_open 434
pidfd_getfd 438 pidfd_send_signal 424 bpf 321 perf_event_open 298 add_key 248 request_key 249
keyctl 250 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 userfaultfd 323
name_to_handle_at 303 open_by_handle_at 304 init_module 175 finit_module 313 delete_module 176
kexec_load 246 kexec_file_load 320 reboot 169 swapon 167 swapoff 168 mknod 133 mknodat 259
execve 59 execveat 322 socket 41 socketpair 53 connect 42 bind 49 listen 50 accept 43 accept4 288
shmget 29 shmat 30 shmctl 31 msgget 68 msgsnd 69 msgrcv 70 msgctl 71
semget 64 semop 65 semctl 66 semtimedop 220 mq_open 240 mq_unlink 241
quotactl 179 quotactl_fd 443 acct 163 settimeofday 164 clock_settime 227 adjtimex 159
clock_adjtime 305 syslog 103 sethostname 170 setdomainname 171 iopl 172 ioperm 173 modify_ldt 154
vhangup 153 fanotify_init 300 inotify_init 253 inotify_init1 294 migrate_pages 256 move_pages 279
mbind 237 set_mempolicy 238 set_mempolicy_home_node 450 memfd_create 319 memfd_secret 447
lookup_dcookie 212 nfsservctl 180 uselib 134 sysfs 139 ustat 136 clone 56 clone3 435 kill 62
tkill 200 tgkill 234 rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 fcntl 72 prlimit64 302
setpriority 141 ioprio_set 251 sched_setattr 314 sched_setparam 142 sched_setscheduler 144
sched_setaffinity 203 setsid 112 setpgid 109 chmod 90 fchmod 91 fchmodat 268 chown 92 fchown 93
lchown 94 fchownat 260 utime 132 utimes 235 futimesat 261 utimensat 280 setxattr 188
lsetxattr 189 fsetxattr 190 removexattr 197 lremovexattr 198 fremovexattr 199 truncate 76
landlock_create_ruleset 444 landlock_add_rule 445 landlock_restrict_self 446 capset 126
"""

_AARCH64 = """
unshare 97 setns 268 mount 40 umount2 39 pivot_root 41 chroot 51 move_mount 429 open_tree 428
fsopen 430 fsconfig 431 fsmount 432 fspick 433 mount_setattr 442 ptrace 117 process_vm_readv 270
process_vm_writev 271 kcmp 272 process_madvise 440 process_mrelease 448 pidfd_open 434
pidfd_getfd 438 pidfd_send_signal 424 bpf 280 perf_event_open 241 add_key 217 request_key 218
keyctl 219 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 userfaultfd 282
name_to_handle_at 264 open_by_handle_at 265 init_module 105 finit_module 273 delete_module 106
kexec_load 104 kexec_file_load 294 reboot 142 swapon 224 swapoff 225 mknodat 33 execve 221
execveat 281 socket 198 socketpair 199 connect 203 bind 200 listen 201 accept 202 accept4 242
shmget 194 shmat 196 shmctl 195 msgget 186 msgctl 187 msgrcv 188 msgsnd 189
semget 190 semctl 191 semtimedop 192 semop 193 mq_open 180
mq_unlink 181 quotactl 60 quotactl_fd 443 acct 89 settimeofday 170 clock_settime 112 adjtimex 171
clock_adjtime 266 syslog 116 sethostname 161 setdomainname 162 vhangup 58 fanotify_init 262
inotify_init1 26 migrate_pages 238 move_pages 239 mbind 235 set_mempolicy 237
set_mempolicy_home_node 450 memfd_create 279 memfd_secret 447 lookup_dcookie 18 nfsservctl 42
clone 220 clone3 435 kill 129 tkill 130 tgkill 131 rt_sigqueueinfo 138 rt_tgsigqueueinfo 240
fcntl 25 prlimit64 261 setpriority 140 ioprio_set 30 sched_setattr 274 sched_setparam 118
sched_setscheduler 119 sched_setaffinity 122 setsid 157 setpgid 154 fchmod 52 fchmodat 53
fchown 55 fchownat 54 utimensat 88 setxattr 5 lsetxattr 6 fsetxattr 7 removexattr 14
lremovexattr 15 fremovexattr 16 truncate 45 landlock_create_ruleset 444 landlock_add_rule 445
landlock_restrict_self 446 capset 91
"""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""What the kernel tells a seccomp filter of the calling convention in use."""

HIGHEST_KNOWN = 450
"""The highest number that the tables were read up to; a filter refuses what lies above."""


def numbers(machine: str) -> dict[str, int]:
    """Call name -> number on this architecture; raises OSError for one without a table."""
    table = {"x86_64": _X86_64, "aarch64": _AARCH64}.get(machine)
    if table is None:
        raise OSError(f"no table of system calls for {machine!r}; there is one for x86_64, aarch64")
    words = table.split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


class Kernel:
    """The system calls themselves. Every method raises OSError with the call's name on failure."""

    def __init__(self) -> None:
        self.machine = platform.machine()
        self.numbers = numbers(self.machine)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
        """One raw system call; integers are passed as 64-bit values."""
        words: list[object] = [
            ctypes.c_ulong(word & 0xFFFFFFFFFFFFFFFF) if isinstance(word, int) else word
            for word in arguments
        ]
        result = int(self._libc.syscall(ctypes.c_long(self.numbers[name]), *words))
        if result < 0:
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(self, option: int, value: int | ctypes.Array[ctypes.c_char], extra: int = 0) -> None:
        """One process option; `extra` is the mode that goes before PR_SET_SECCOMP's value."""
        first: object = ctypes.c_ulong(option)
        words: list[object] = [ctypes.c_ulong(value) if isinstance(value, int) else value]
        if option == PR_SET_SECCOMP:
            words = [ctypes.c_ulong(extra), *words]
        while len(words) < 4:
            words.append(ctypes.c_ulong(0))
        if self._libc.prctl(first, *words) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")

    def mount(self, source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        """Mount `source` of a kind (or bind it, or change it, as flags say) at `target`."""
        self.call(
            "mount",
            os.fsencode(source),
            os.fsencode(target),
            kind.encode() if kind else None,
            flags,
            options.encode() if options else None,
        )

    def make_mount(self, path: str, flags: int) -> None:
        """Set MOUNT_ATTR_ flags on a mount and all mounts below it."""
        attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
        buffer = ctypes.create_string_buffer(attributes, len(attributes))
        self.call(
            "mount_setattr", AT_FDCWD, os.fsencode(path), AT_RECURSIVE, buffer, len(attributes)
        )

    def drop_capabilities(self, *, keep: tuple[int, ...] = ()) -> None:
        """Give up every capability but those in `keep`; no exec follows that could regain one."""
        mask = sum(1 << capability for capability in keep)
        low, high = mask & 0xFFFFFFFF, mask >> 32
        header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        data = struct.pack("=6I", low, low, 0, high, high, 0)
        self.call(
            "capset",
            ctypes.create_string_buffer(header, len(header)),
            ctypes.create_string_buffer(data, len(data)),
        )

    def no_new_privileges(self) -> None:
        """Set-user-id programs and file capabilities mean nothing from here on."""
        self.prctl(PR_SET_NO_NEW_PRIVS, 1)
