"""The console command `s2t`: starts a command, under `accelerate launch` where several processes are wanted.

As a module (`python -m s2t_recipes.cli train ...`) it runs a command in this process.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.metadata import version

from s2t_recipes.commands import COMMANDS, one_line_errors, run, say


#: Commands that `accelerate launch` can start. The others run in one process.
LAUNCHED = ("label", "train")
#: Options of `accelerate launch` that are TrainingArguments too: the command gets them.
NOT_OF_THE_LAUNCHER = ("--help", "--debug", "--gradient_accumulation_steps", "--gradient-accumulation-steps")


def main() -> None:
    """Entry point of `s2t`."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"transformers-s2t {version('transformers-s2t')}")
    elif name not in COMMANDS:
        sys.argv[0] = "s2t"  # also where python -m s2t_recipes was typed
        say(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}.")
        sys.exit(2)
    elif name in LAUNCHED and "LOCAL_RANK" not in os.environ and not {"-h", "--help"}.intersection(arguments):
        flags, arguments = split_arguments(arguments)
        if flags or (name == "train" and wants_launcher()):
            launch(flags, name, arguments)
        else:
            run_here(name, arguments)
    else:
        run_here(name, arguments)


def overview() -> str:
    """What `s2t --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "Select to Think: a small language model decodes, and selects at the few tokens that matter.",
            "",
            "    s2t COMMAND --help",
            "",
            "usage: s2t [--help] [--version] COMMAND [--config FILE.yaml] [--OPTION VALUE ...]",
            "",
            "commands:",
            *(f"  {name:<{width}}{command.purpose}" for name, command in COMMANDS.items()),
            "",
            f"{' and '.join(LAUNCHED)} also take the options of `accelerate launch`: s2t train --num_processes 4 ...",
        ]
    )


def run_here(name: str, arguments: list[str]) -> None:
    """Runs a command in this process."""
    sys.argv = [f"s2t {name}", *arguments]
    run(COMMANDS[name].module)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Options of `accelerate launch`, with their values, and those of the command."""
    if not any(argument.startswith("--") for argument in arguments):
        return [], arguments
    from accelerate.commands.launch import launch_command_parser

    known = {
        option: action
        for action in launch_command_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option not in NOT_OF_THE_LAUNCHER
    }
    flags, rest, left = [], [], list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, _ = argument.partition("=")
        if option not in known:
            rest.append(argument)
            continue
        flags.append(argument)
        if known[option].nargs != 0 and not equals and left:
            flags.append(left.pop(0))
    return flags, rest


def wants_launcher() -> bool:
    """Whether `accelerate launch` without options would start more than one process, or start it in another way: there
    are several devices, or `accelerate config` has written a file."""
    import torch
    from accelerate.commands.config import default_config_file

    return torch.accelerator.device_count() > 1 or os.path.isfile(default_config_file)


def launch(flags: list[str], name: str, arguments: list[str]) -> None:
    """Runs a command under `accelerate launch`, and ends with the exit status of the process that failed first."""
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    sys.argv[0] = f"s2t {name}"
    options = [*flags, "--module", "s2t_recipes.cli", name, *arguments]
    try:
        with one_line_errors():  # of options that do not go together
            launch_command(launch_command_parser().parse_args(options))
        return
    except CalledProcessError as error:
        status = error.returncode
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except SignalException as error:
        status = 128 + error.sigval
    except KeyboardInterrupt:  # the process got it too, and says so
        with suppress(ChildProcessError):
            os.wait()
        status = 130
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":  # what `launch` starts
    run_here(sys.argv[1], sys.argv[2:])
