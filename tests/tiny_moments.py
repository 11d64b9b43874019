"""Acting at a chosen moment of a call: in front of a line, or of a bytecode, that Python runs in some files.

Knows nothing of what is tested. `size` says how many random tries a test makes: few in CI, many with `--tries`.
"""

import contextlib
import sys
from pathlib import Path

import torch

import transformers_s2t


#: Where moments are counted unless a test says otherwise.
PACKAGE = str(Path(transformers_s2t.__file__).parent)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Tracer:
    """Follows frames of `files`, and the steps of `contextlib` that they take to enter and leave a context."""

    def __init__(self, files, opcodes, at=None, action=None):
        self.files, self.opcodes, self.at, self.action = files, opcodes, at, action
        self.moments = []

    def _is_followed(self, frame):
        file = frame.f_code.co_filename
        if file == contextlib.__file__ and frame.f_back is not None:
            file = frame.f_back.f_code.co_filename
        return file.startswith(self.files)

    def __call__(self, frame, event, arg):
        if not self._is_followed(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        return self._within

    def _within(self, frame, event, arg):
        if event == ("opcode" if self.opcodes else "line"):
            self.moments.append((Path(frame.f_code.co_filename).name, frame.f_lineno))
            if self.at == len(self.moments) - 1:
                self.action()
        return self._within


def _traced(call, tracer):
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        return call()
    finally:
        sys.settrace(before)


def moments_of(call, files=(PACKAGE,), opcodes=False):
    """(file, line) of every moment of a whole call, in order."""
    tracer = _Tracer(tuple(files), opcodes)
    _traced(call, tracer)
    return tracer.moments


def act_at(index, action, call, files=(PACKAGE,), opcodes=False):
    """What `call` returns where `action` runs in front of its `index`-th moment; what that raises, the call raises."""
    return _traced(call, _Tracer(tuple(files), opcodes, index, action))


def spread(moments, number, seed=0):
    """Indices of `number` random moments, of as many different lines as there are: each line once before any twice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(moments), generator=generator).tolist()
    times, ranked = {}, []
    for index in order:
        times[moments[index]] = times.get(moments[index], 0) + 1
        ranked.append((times[moments[index]], index))
    ranked.sort(key=lambda pair: pair[0])
    return [index for _, index in ranked[:number]]


def interrupt():
    """What Ctrl-C does wherever Python is."""
    raise KeyboardInterrupt


@torch.no_grad()
def logits_of(model, inputs):
    """Logits of a forward of the user's own."""
    return model(**inputs).logits.clone()


def state_of(model):
    """What a call must leave alone: modules and who is where, hooks, exchanged methods, adapters on and off, modes."""
    state = {}
    for name, module in model.named_modules():
        active = vars(module).get("_active_adapter")
        state[name] = {
            "module": id(module),
            "kind": type(module),
            "children": {child: id(value) for child, value in module._modules.items()},
            "hooks": [id(hook) for kind in _HOOKS for hook in getattr(module, kind).values()],
            "own methods": sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"),
            "adapters off": vars(module).get("_disable_adapters"),
            "active adapters": [active] if isinstance(active, str) else active and list(active),
            "training": module.training,
            "trained": {key: value.requires_grad for key, value in module._parameters.items() if value is not None},
        }
    return state


def changes(before, after):
    """How two states differ, in words; empty where they do not."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            found.append(f"module {name!r} {'appeared' if old is None else 'is gone'}")
        else:
            found += [f"{name or 'model'}: {key}" for key in old if old[key] != new[key]]
    return found
