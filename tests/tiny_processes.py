"""Processes as `accelerate launch` starts them, forked from this one, so that no import is paid for again.

Accelerate reads its config file and options and sets the environment, as ever; only torchrun, which would start new
interpreters, is replaced. Where an accelerator is, whose driver survives no fork, the interpreters are new ones.
"""

import os
from multiprocessing import get_context
from unittest import mock

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState


TIMEOUT = 240  # seconds


def _run(environment, work, args):
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)  # what the tests before left in this process
    work(*args)


def _run_all(environments, work, args, status=0):
    context = get_context("spawn" if torch.accelerator.is_available() else "fork")
    processes = [context.Process(target=_run, args=(environment, work, args)) for environment in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [status] * len(processes)


def run_alone(work, *args, status=0):
    """Runs `work(*args)` in one process of its own, which ends with this exit status."""
    _run_all([{}], work, args, status)


def launch(options, work, *args):
    """Runs `work(*args)` in the processes that `accelerate launch *options` starts, which all end well."""

    def run(settings):
        number = settings.nproc_per_node
        shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(settings.master_port)}
        _run_all([shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(int(number))], work, args)

    arguments = launch_command_parser().parse_args([*map(str, options), "no script"])
    with mock.patch("torch.distributed.run.run", run):
        launch_command(arguments)
