"""The runtime where POSIX's modules and functions are missing, as on Windows: imported, and a picture filled.

`make lint` finds such names by mypy, for Windows and macOS; this test also sees what libraries and `getattr` reach.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows itself is such a system")

MODULES = ("_posixshmem", "crypt", "fcntl", "grp", "nis", "ossaudiodev", "pty", "pwd", "readline", "resource", "spwd")
MODULES += ("syslog", "termios", "tty")
# Of Linux and not of Windows by typeshed. `os` and `signal` keep what the standard library itself needs to run here.
OS = (
    "O_ASYNC O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_LARGEFILE O_NDELAY O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK "
    "O_PATH O_RSYNC O_SYNC O_TMPFILE chown chroot confstr copy_file_range ctermid fchdir fchmod fchown fdatasync "
    "fork forkpty fpathconf fstatvfs getegid geteuid getgid getgrouplist getgroups getloadavg getpgid getpgrp "
    "getpriority getresgid getresuid getsid getuid getxattr initgroups killpg lchown listxattr lockf major "
    "makedev memfd_create minor mkfifo mknod nice openpty pathconf pidfd_open posix_fadvise posix_fallocate "
    "posix_spawn posix_spawnp pread preadv pwrite pwritev readv register_at_fork removexattr sched_getaffinity "
    "sched_getparam sched_getscheduler sched_setaffinity sched_setparam sched_setscheduler sched_yield sendfile "
    "setegid seteuid setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setsid setuid "
    "setxattr statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev "
)
SIGNAL = (
    "ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP "
    "SIGTTIN SIGTTOU SIGURG SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH alarm getitimer pause pthread_kill pthread_sigmask "
    "setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo "
)
# Standard library and dependencies load first: they follow `os.name` and have their own form for Windows.
BEFORE = """
import asyncio, concurrent.futures.process, ctypes, hashlib, importlib.metadata, json, logging, multiprocessing.queues
import pathlib, platform, shutil, subprocess, sysconfig, tempfile, threading, uuid, zoneinfo
import numpy, onnxruntime, pydantic.fields, typer, rich.console, rich.progress, rich.live, typer.rich_utils
from PIL import Image
Image.init()
sysconfig.get_config_vars()
"""
ABSENT = """
import os, signal, sys
for name in MODULES:
    sys.modules[name] = None
for module, names in ((os, OS), (signal, SIGNAL)):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
sys.argv[0] = "moebius-inpaint"
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    names = f"MODULES, OS, SIGNAL = {MODULES!r}, {OS.split()!r}, {SIGNAL.split()!r}\n"
    command = [sys.executable, "-c", BEFORE + names + ABSENT + code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "MOEBIUS_KERNELS"}  # none are there
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=120, check=False, env=environment
    )


def test_every_module_imports():
    """All modules of the runtime; what a runtime's own library needs is imported only when it is used."""
    done = run(
        "import importlib, pkgutil, moebius_runtime\n"
        "for one in pkgutil.walk_packages(moebius_runtime.__path__, 'moebius_runtime.'):\n"
        "    if not one.name.endswith('libmoebius_kernels'):  # no module of Python\n"
        "        importlib.import_module(one.name)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [(), ("--overwrite", "--mode", "fast")], ids=["new", "overwritten"])
def test_a_picture_is_filled_and_written(toy_bundle, tmp_path, more):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (150, 170, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros((150, 170), np.uint8)
    mask[40:80, 50:90] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    out = tmp_path / "b.png"
    if more:
        out.write_bytes(b"old")
    options = ["--mask", tmp_path / "m.png", "--bundle", toy_bundle.path, "--out", out, "--steps", 2, *more]
    done = run("from moebius_runtime.cli import main\nmain()", tmp_path / "a.png", *options)
    assert done.returncode == 0, done.stderr
    before, after = (np.asarray(Image.open(path)) for path in (tmp_path / "a.png", out))
    assert after.shape == before.shape
    assert (after[mask > 0] != before[mask > 0]).mean() > 0.5


def test_a_name_that_is_missing_would_be_seen():
    """So that the tests above can fail."""
    done = run("import os\nos.getuid()")
    assert done.returncode == 1
    assert "AttributeError" in done.stderr
    assert run("import fcntl").returncode == 1
