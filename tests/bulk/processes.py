"""Processes that are killed, as forks of this one: the heavy imports are made once."""

import contextlib
import os
import signal
import sys
import traceback


def start(work):
    """Run `work` in a fork; returns its process id. Its exit status is 0, or 1 where it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if not process:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)
    return process


def wait(process):
    """The exit status of a process; negative, the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process):
    """Kill a process that may have ended; returns its exit status."""
    os.kill(process, signal.SIGKILL)
    return wait(process)


def dying_at(event_number, work):
    """`work`, killed at its n-th use of the file system (as Python's audit events tell)."""

    def killed():
        left = event_number

        def hook(event, arguments):
            nonlocal left
            if event in _EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return killed


_EVENTS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock", "os.listdir"}
