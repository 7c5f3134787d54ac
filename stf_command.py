"""The command `stf`: what the examples do, for whoever has the wheel alone.

stf train cifar10|enwik8|imagenet64|audio [--flags]    trains a preset, and goes on with --resume
stf generate --checkpoint=FILE [--flags]               samples and completions
stf evaluate --checkpoint=FILE [--flags]               bits a byte of a whole split
stf maps --checkpoint=FILE --image=FILE [--flags]      attention maps over an image, as in the paper's Figure 2
stf finetune --checkpoint=FILE [--flags]               what a model of CIFAR-10 knows of its ten classes
stf presets                                            the named models, as a table
stf doctor                                             what this machine has, and whether stf computes rightly on it
stf version

Flags: stf train cifar10 --help
"""

# Beside the package, not in it: what is asked of TensorFlow's log has to be said before stf, which imports TensorFlow.
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import runpy
import sys

PROGRAMS = {
    "train": {name: f"train_{name}" for name in ("cifar10", "enwik8", "imagenet64", "audio")},
    "generate": "generate",
    "evaluate": "evaluate",
    "maps": "attention_maps",
    "finetune": "finetune_cifar10",
}


def examples():
    """The folder of the programs: beside stf in a checkout, in the package where it is installed."""
    package = pathlib.Path(importlib.util.find_spec("stf").origin).parent
    installed = package / "examples"
    return installed if installed.is_dir() else package.parent / "examples"


def main(arguments=None):
    """Runs a command line, that of the process unless given; returns the exit code, or leaves with it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "help"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if name in ("help", "-h", "--help", "--helpshort"):
        print(__doc__)
        return 0
    if name in ("version", "--version"):
        print(importlib.metadata.version("stf"))
        return 0
    if name == "presets":
        print(importlib.import_module("stf.models.presets").table())
        return 0
    if name == "doctor":
        return importlib.import_module("stf.doctor").main()
    program, used = PROGRAMS.get(name), 1
    if isinstance(program, dict):
        kind = arguments[1] if len(arguments) > 1 else None
        if kind in ("-h", "--help", "--helpshort"):
            print(__doc__)
            return 0
        if kind not in program:
            return _refuse(f"{name} needs one of {', '.join(program)}. Received: {kind}")
        program, used = program[kind], 2
    if program is None:
        known = [*PROGRAMS, "presets", "doctor", "version"]
        return _refuse(f"the command must be one of {', '.join(known)}. Received: {name}")
    sys.argv = [name, *arguments[used:]]  # its first is the program's path in there
    runpy.run_path(str(examples() / f"{program}.py"), run_name="__main__")
    return 0


def _refuse(message):
    print(f"stf: {message}\n`stf help` shows them all.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
