"""Ctrl-C at any moment of a call: the model is bit for bit what it was, and the next call is right.

Either a real SIGINT finds the call wherever it is, or KeyboardInterrupt is raised in front of a chosen line or
bytecode of this package. CI makes a few tries; a night's worth is `pytest tests/test_interrupts.py --tries 300`.
"""

import gc
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from test_decode import generate, name_of, plain, save_adapter, set_up
from test_router import make_router
from test_s2t_trainer import make_trainer, randomise
from tiny import SCOPES, SETUPS, WAYS, offer_all, prompts, tiny_model
from tiny_moments import PACKAGE, act_at, changes, interrupt, logits_of, moments_of, spread, state_of

from transformers_s2t import LocalSelector


INPUTS = prompts((5, 4), seed=5)
SETTINGS = {"max_new_tokens": 5, "eos_token_id": None}
PEFT = str(Path(peft.__file__).parent)


class Scene:
    """A model that is called again and again, and made anew where an interrupt left it changed."""

    def __init__(self, setup, way, router=False, config=None, settings=SETTINGS):
        self.setup, self.way, self.router, self.settings = setup, way, router, settings
        self.config = config or (offer_all(trigger="router", threshold=0.0) if router else offer_all())
        self.make()
        self.expected = self.call()
        self.state = state_of(self.model)  # after a whole call: what is set once is no change
        self.logits = logits_of(self.model, INPUTS)

    def make(self):
        self.model, self.selector = set_up(self.setup)
        if self.router:
            self.selector.router = make_router(self.model, 1)
        if hasattr(self, "expected"):
            assert self.call() == self.expected
            self.state = state_of(self.model)

    def call(self):
        return generate(self.way, self.model, INPUTS, self.selector, self.config, **self.settings).tolist()


def fault(scene):
    """What is wrong with a scene's model now, in words; empty where nothing is."""
    if changes(scene.state, state_of(scene.model)):
        gc.collect()  # what the call's own objects hold goes with them
    what = changes(scene.state, state_of(scene.model))
    for found, call, right in (
        ("other logits", lambda: logits_of(scene.model, INPUTS).tolist(), scene.logits.tolist()),
        ("another result of the next call", scene.call, scene.expected),
    ):
        try:
            if call() != right:
                what.insert(0, found)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            what.insert(0, repr(error)[:80])
    return what


def check(scene, tries, interrupted):
    """No try leaves a fault. `interrupted(try)` runs the call and says where it was cut off, `None` for nowhere."""
    faults, places = [], 0
    for number in tries:
        place = interrupted(number)
        places += place is not None
        if what := fault(scene):
            faults.append(f"{place}: {', '.join(what[:3])}{' ...' if len(what) > 3 else ''}")
            scene.make()
    assert not faults, f"{len(faults)} of {places} interrupts leave a fault:\n" + "\n".join(faults[:12])
    assert places, "nothing was interrupted"


def interrupted_at(call, moments, index, **how):
    """Where `call` was interrupted; `None` where it was shorter than the last time."""
    try:
        act_at(index, interrupt, call, **how)
    except KeyboardInterrupt:
        return "{}:{}".format(*moments[index])
    return None


CALLS = [pytest.param(setup, way, False, id=f"{name_of(setup)}-{way}") for setup in SETUPS for way in WAYS]
CALLS += [pytest.param(setup, way, True, id=f"{name_of(setup)}-{way}-router") for setup in SETUPS[:2] for way in WAYS]


@pytest.mark.parametrize(
    "opcodes", [pytest.param(False, id="lines"), pytest.param(True, id="bytecodes", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("setup", "way", "router"), CALLS)
def test_an_interrupt_in_front_of_any_line_or_bytecode(setup, way, router, opcodes, tries):
    scene = Scene(setup, way, router)
    moments = moments_of(scene.call, opcodes=opcodes)
    check(
        scene,
        spread(moments, tries(4 if opcodes else 8)),
        lambda index: interrupted_at(scene.call, moments, index, opcodes=opcodes),
    )


class Signals:
    """Real SIGINTs from another thread. One that comes when the call is over is no interrupt of anything."""

    def __init__(self):
        self.armed, self.place = False, None

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.before)

    def handle(self, number, frame):
        if self.armed:
            self.armed = False
            while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            self.place = "generate" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            raise KeyboardInterrupt

    def interrupt(self, call, delay):
        """Runs `call`, interrupted after `delay` seconds; where in this package, `None` where it was over before."""
        self.place = None
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            self.armed = True
            timer.start()
            call()
        except KeyboardInterrupt:
            pass
        finally:
            self.armed = False
            timer.join()
        return self.place


@pytest.mark.parametrize(("setup", "way", "router"), CALLS)
def test_a_real_signal_at_any_moment(setup, way, router, tries):
    scene = Scene(setup, way, router)
    start = time.perf_counter()
    scene.call()
    length = time.perf_counter() - start
    shares = torch.rand(tries(4), generator=torch.Generator().manual_seed(0)).tolist()
    with Signals() as signals:
        check(scene, shares, lambda share: signals.interrupt(scene.call, share * length))


# ---------------------------------------------------------------------------------------------------------------------
# Loading and training


@pytest.mark.parametrize("files", [(PACKAGE,), (PEFT,)], ids=["s2t", "peft"])
@pytest.mark.parametrize("setup", SCOPES, ids=name_of)
def test_an_interrupted_loading_changes_no_text(setup, files, tmp_path, tries):
    """The model writes as before, or as after the whole loading; loaded again it selects right or is refused."""
    save_adapter(tmp_path, setup)

    def load(model):
        return LocalSelector.from_pretrained(tmp_path, model)

    def text(model, selector):
        return generate("loop", model, INPUTS, selector, offer_all(), **SETTINGS).tolist()

    moments = moments_of(partial(load, tiny_model()), files)
    fresh = tiny_model()
    allowed = [logits_of(fresh, INPUTS)]
    expected = text(fresh, load(fresh))
    allowed.append(logits_of(fresh, INPUTS))
    faults, refused = [], 0
    numbers = spread(moments, tries(4))
    for index in numbers:
        model = tiny_model()
        place = interrupted_at(partial(load, model), moments, index, files=files)
        assert place is not None
        logits = logits_of(model, INPUTS)
        if not any(torch.equal(logits, others) for others in allowed):
            faults.append(f"{place}: the model writes something else")
        try:
            selector = load(model)
        except ValueError:
            refused += 1
            continue
        if text(model, selector) != expected:
            faults.append(f"{place}: loaded again it selects something else")
    assert not faults, f"{len(faults)} of {len(numbers)} ({refused} are refused later):\n" + "\n".join(faults[:12])


class Training:
    """A trainer in a notebook: one loss was computed, and the model is to stay usable when the next is interrupted."""

    def __init__(self, folder, **config):
        self.folder, self.config = folder, config
        self.make()

    def make(self):
        self.trainer = make_trainer(self.folder, **self.config)
        randomise(self.trainer)
        self.model = self.trainer.model
        self.inputs = next(iter(self.trainer.get_train_dataloader()))
        self.expected = self.call()
        self.state = state_of(self.model)
        self.logits = logits_of(self.model, INPUTS)

    def call(self):
        return self.trainer.compute_loss(self.model, self.inputs).item()


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("scope", ["candidate", "sequence"])
def test_an_interrupted_loss_leaves_the_adapter_as_it_was(scope, opcodes, tmp_path, tries):
    config = {"prefix_kl_weight": 1.0} if scope == "sequence" else {}
    training = Training(tmp_path, adapter_scope=scope, **config)
    moments = moments_of(training.call, opcodes=opcodes)
    check(
        training,
        spread(moments, tries(6)),
        lambda index: interrupted_at(training.call, moments, index, opcodes=opcodes),
    )


def test_a_plain_text_that_is_interrupted_changes_nothing(tries):
    """What the library itself promises: a fault above is none of its own."""
    scene = Scene("teacher", "loop")
    scene.call = lambda: plain(scene.model, INPUTS, **SETTINGS).tolist()
    scene.expected = scene.call()
    start = time.perf_counter()
    scene.call()
    length = time.perf_counter() - start
    shares = torch.rand(tries(4), generator=torch.Generator().manual_seed(0)).tolist()
    with Signals() as signals:
        check(scene, shares, lambda share: signals.interrupt(scene.call, share * length))
