"""Namespaces: a world in which there is nothing to attack.

The fork server enters one set for its lifetime: a user namespace (an ordinary user there and
outside), and a mount namespace whose root holds the interpreter's own files, read-only, three
harmless devices, and an empty directory. Each run then gets PID, mount, network, IPC and UTS
namespaces of its own, and a fresh, bounded tmpfs as its directory, which ends with the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from sparring.rewards.sandbox.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_NODEV,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    PR_SET_DUMPABLE,
    Kernel,
)

NOBODY = 65534
BOX = "/box"
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_OLD_ROOT = "/.outside"
_ROOT_ON = "/tmp"


def enter(kernel: Kernel, readable: Sequence[str], *, uid: int) -> None:
    """Move this process (a single thread) into the fork server's namespaces.

    readable: absolute paths that stay visible. uid: the ordinary user to become where this process
    is root. The PID namespace is entered by the next child. Raises OSError.
    """
    process = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        private = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS
        is_built = False
        if may_become(uid):
            # Real root builds the root while it may still read the interpreter's files, wherever
            # they lie, and then becomes an ordinary user, whose processes the kernel counts.
            try:
                kernel.call("unshare", CLONE_NEWNS)
                _build_root(kernel, readable)
                is_built = True
            except PermissionError:  # root without CAP_SYS_ADMIN, as in most containers
                pass
            become(kernel, uid)
        outer_uid, outer_gid = os.geteuid(), os.getegid()
        kernel.call("unshare", CLONE_NEWUSER | private)
        _write(process, "setgroups", "deny")
        _write(process, "uid_map", f"{NOBODY} {outer_uid} 1")
        _write(process, "gid_map", f"{NOBODY} {outer_gid} 1")
        if not is_built:
            _build_root(kernel, readable)
    finally:
        os.close(process)


def may_become(uid: int) -> bool:
    """Whether this process is root and `uid` exists in its user namespace."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map") as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    return any(first <= uid < first + count for first, _, count in ranges)


def become(kernel: Kernel, uid: int) -> None:
    """Turn root into this ordinary user and group, with no other groups and no way back."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    kernel.prctl(PR_SET_DUMPABLE, 1)  # else /proc/self would belong to root


def enter_for_run(kernel: Kernel, *, disk_bytes: int, max_files: int) -> None:
    """Fresh namespaces and a fresh directory at BOX for one run; the next child is its PID 1."""
    kernel.call("unshare", CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNS)
    kernel.mount("none", "/", "", MS_REC | MS_PRIVATE)
    options = f"size={disk_bytes},nr_inodes={max_files + 1},mode=0700"
    kernel.mount("tmpfs", BOX, "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(BOX)


def _write(directory: int, name: str, text: str) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _build_root(kernel: Kernel, readable: Sequence[str]) -> None:
    """Make a read-only tmpfs with binds of `readable` the root, and let go of the old one."""
    sources = [(path, os.path.realpath(path)) for path in _outermost(readable)]
    kernel.mount("none", "/", "", MS_REC | MS_PRIVATE)
    kernel.mount("tmpfs", _ROOT_ON, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    old = _ROOT_ON + _OLD_ROOT
    os.mkdir(old, 0o700)
    kernel.call("pivot_root", os.fsencode(_ROOT_ON), os.fsencode(old))
    os.chdir("/")
    previous = os.umask(0o022)
    for path, real in sources:
        _bind(kernel, real, path, is_device=False)
    for path in DEVICES:
        _bind(kernel, path, path, is_device=True)
    os.mkdir(BOX)
    os.umask(previous)
    kernel.call("umount2", os.fsencode(_OLD_ROOT), MNT_DETACH)
    os.rmdir(_OLD_ROOT)
    kernel.mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths without those that lie below another of them."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}):
        if not any(path.startswith(parent + "/") for parent in kept):
            kept.append(path)
    return kept


def _bind(kernel: Kernel, real: str, path: str, *, is_device: bool) -> None:
    """Show `real` of the old root at `path` in the new one, read-only, if it is there."""
    outside = _OLD_ROOT + real
    if not os.path.exists(outside):
        return
    if os.path.isdir(outside):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    kernel.mount(outside, path, "", MS_BIND | MS_REC)
    flags = MOUNT_ATTR_NOSUID | (0 if is_device else MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV)
    kernel.make_mount(path, flags)
