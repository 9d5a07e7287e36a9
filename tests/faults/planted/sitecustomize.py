"""Faults in functions of the product, without a hook in it: Python imports this module first, where it is on the path.

A process with `PLANTED`, a directory, gets each of the functions that its `functions.json` names wrapped as their
module is imported. A call looks for its fault in `armed.json`, a list of faults that a test writes at any time. The
first `times` calls, over all processes, leave a mark in the directory and do it: 'kill' ends the process as the kernel
does, before the call or after it; 'hoard' takes memory until somebody ends it; 'wait' goes on when there is a file 'go'
in the directory; 'fill' fills the disk at `disk` up.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import time

MIB = 1 << 20


def planted_in(name):
    """A file of the directory, as JSON; a list without items where there is none."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(os.environ["PLANTED"], name)) as file:
        return json.load(file)
    return []


def strike(function, when):
    """Do the faults of a function that are armed."""
    for number, fault in enumerate(planted_in("armed.json")):
        if (fault["function"], fault["when"]) == (function, when):
            do(fault, number)


def do(fault, number):
    """Do the fault, if it is still wanted."""
    for turn in range(fault["times"]):
        path = os.path.join(os.environ["PLANTED"], f"mark-{number}-{turn}")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            continue
        os.write(descriptor, str(os.getpid()).encode())
        os.close(descriptor)
        if fault["does"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault["does"] == "wait":
            while not os.path.exists(os.path.join(os.environ["PLANTED"], "go")):
                time.sleep(0.05)
            return
        if fault["does"] == "fill":
            fill(fault["disk"])
            return
        hoard = []
        while len(hoard) * 20 < fault["mib"]:
            hoard.append(b"x" * (20 * MIB))
            time.sleep(0.02)
        time.sleep(60)
        raise AssertionError("nobody minded the memory")


def fill(disk):
    """Take all the room that a disk has."""
    with open(os.path.join(disk, "filler"), "wb") as file:
        taken = 0
        while free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize:
            with contextlib.suppress(OSError):  # another process has taken some of it since
                os.posix_fallocate(file.fileno(), taken, free)
                taken += free


def planted(function, name):
    """The function with its faults."""

    @functools.wraps(function)
    def call(*arguments, **named):
        strike(name, "before")
        result = function(*arguments, **named)
        strike(name, "after")
        return result

    return call


class Planter(importlib.abc.MetaPathFinder):
    """Finds the modules that faults are planted in."""

    def __init__(self, functions):
        self.functions = functions

    def find_spec(self, name, path, target=None):
        own = [function for function in self.functions if function.partition(":")[0] == name]
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if own else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for function in own:
                *owners, last = function.partition(":")[2].split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, last, planted(getattr(owner, last), function))

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("PLANTED"):
    import sys

    sys.meta_path.insert(0, Planter(planted_in("functions.json")))
