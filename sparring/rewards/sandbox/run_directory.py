"""A run's directory where there is no private tmpfs: how full it is, and how it is removed.

Only directory descriptors are used and no link is followed, so a tree of any depth, with any modes
and any names, can be measured and removed. Nothing of the run is alive any more when it is removed.
"""

from __future__ import annotations

import os
import stat

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_over(path: str, *, max_bytes: int, max_files: int) -> bool:
    """Whether the tree below `path` holds more bytes or entries than allowed.

    Costs at most max_files look-ups. Entries that vanish meanwhile are passed over.
    """
    total_bytes = total_files = 0
    waiting = [os.open(path, _FLAGS)]
    try:
        while waiting:
            descriptor = waiting.pop()
            try:
                for name in os.listdir(descriptor):
                    try:
                        found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                        total_files += 1
                        total_bytes += found.st_blocks * 512
                        if stat.S_ISDIR(found.st_mode):
                            waiting.append(os.open(name, _FLAGS, dir_fd=descriptor))
                    except OSError:
                        continue
                    if total_files > max_files or total_bytes > max_bytes or len(waiting) > 200:
                        return True  # 200: wider and deeper than any honest program's
            finally:
                os.close(descriptor)
    finally:
        for descriptor in waiting:
            os.close(descriptor)
    return False


def remove(path: str) -> None:
    """Remove the directory and everything below it; raises OSError if something stays.

    Nothing is to be done where it is gone already.
    """
    try:
        top = os.open(path, _FLAGS)
    except FileNotFoundError:
        return
    try:
        serial, prefix = 0, f"lifted-{os.urandom(12).hex()}-"
        waiting = True
        while waiting:
            waiting = False
            for name in os.listdir(top):
                serial = _empty(top, name, prefix, serial)
                waiting = True
    finally:
        os.close(top)
    os.rmdir(path)


def _empty(top: int, name: str, prefix: str, serial: int) -> int:
    """Remove one entry of the top directory, first lifting the directories in it up to the top."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=top)
        return serial
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, _FLAGS, dir_fd=top)
    try:
        for child in os.listdir(inner):
            found = os.stat(child, dir_fd=inner, follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                os.chmod(child, 0o700, dir_fd=inner)  # moving a directory needs to write in it
                serial += 1
                os.rename(child, f"{prefix}{serial}", src_dir_fd=inner, dst_dir_fd=top)
            else:
                os.unlink(child, dir_fd=inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)
    return serial
