"""Calls in several threads on one model: each gives what it gives alone, and the model is the same afterwards.

A call is paired with another one that runs at the same time, or whole in the middle of it, between two of its lines.
CI makes a few tries; a night's worth is `pytest tests/test_threads.py --tries 200`.
"""

import sys
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Barrier

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_decode import generate, name_of, plain, save_adapter, set_up
from test_router import make_router
from tiny import SCOPES, SETUPS, WAYS, make_selector, offer_all, prompts, tiny_model
from tiny_moments import act_at, changes, logits_of, moments_of, spread, state_of

from transformers_s2t import S2T, LocalSelector, TeacherSelector


SWITCH_INTERVAL = 1e-5  # seconds; Python's own is 5e-3
PATIENCE = 60.0  # seconds for a thread that may wait for another one
SETTINGS = {"max_new_tokens": 10, "eos_token_id": None}
HERE, THERE = prompts((6,), seed=5), prompts((4, 6), seed=8)


@dataclass
class Scene:
    """Two calls that are to run at once, the models that they share, and whether they may be refused instead."""

    calls: tuple
    models: tuple
    may_refuse: bool = False


def text(model, inputs, selector, way, config=None):
    """The tokens of a call with S2T."""
    return lambda: generate(way, model, inputs, selector, config or offer_all(), **SETTINGS).tolist()


def plain_text(model, inputs):
    return lambda: plain(model, inputs, **SETTINGS).tolist()


def forwards(model, inputs, times=10):
    """Logits of forwards of the user's own, one after another."""
    return lambda: [logits_of(model, inputs).tolist() for _ in range(times)]


def two_plain_texts(folder):
    model = tiny_model()
    return Scene((plain_text(model, HERE), plain_text(model, THERE)), (model,))


def plain_and_s2t(folder, setup, way):
    model, selector = set_up(setup)
    return Scene((plain_text(model, HERE), text(model, THERE, selector, way)), (model,))


def forward_and_s2t(folder, setup, way):
    model, selector = set_up(setup)
    return Scene((forwards(model, HERE), text(model, THERE, selector, way)), (model,))


def one_selector(folder, setup, way, other_way):
    model, selector = set_up(setup)
    return Scene((text(model, HERE, selector, way), text(model, THERE, selector, other_way)), (model,))


def one_processor(folder, setup):
    """A state for each thread, or an error that says so."""
    model, selector = set_up(setup)
    processors = S2T(selector, config=offer_all())

    def call(inputs):
        return lambda: plain(model, inputs, logits_processor=processors, **SETTINGS).tolist()

    return Scene((call(HERE), call(THERE)), (model,), may_refuse=True)


def saved(folder, setup, seed=1):
    path = folder / f"{name_of(setup)}-{seed}"
    if not path.exists():
        save_adapter(path, setup, seed=seed)
    return path


def two_selectors(folder, setup, other_setup, way):
    model, texts = tiny_model(), []
    for number, (one, inputs) in enumerate(((setup, HERE), (other_setup, THERE))):
        path = saved(folder, one, seed=1 + number)
        selector = LocalSelector.from_pretrained(path, model, adapter_name=f"s2t{number}")
        texts.append(text(model, inputs, selector, way))
    return Scene(tuple(texts), (model,))


def with_router(folder, setup, way, other_way):
    """The router reads what one layer put out: that of its own call. Without another way: beside a plain text."""
    model, selector = set_up(setup)
    selector.router = make_router(model, 1)
    config = offer_all(trigger="router", threshold=0.0)
    other = plain_text(model, HERE) if other_way is None else text(model, HERE, selector, other_way, config)
    return Scene((other, text(model, THERE, selector, way, config)), (model,))


def teacher_is_a_student(folder, setup, way):
    """The teacher of one call is the model that the other call selects in, and writes with."""
    model, teacher = tiny_model(), tiny_model(seed=9)
    selector = TeacherSelector(model) if setup == "teacher" else make_selector(teacher, *setup)
    return Scene(
        (text(model, HERE, TeacherSelector(teacher), way), text(teacher, THERE, selector, way)), (model, teacher)
    )


def own_adapter(folder, setup, way):
    """A plain text of the user's own adapter, beside a selector that was loaded into the same model."""
    torch.manual_seed(7)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), peft_config, adapter_name="own").eval()
    selector = LocalSelector.from_pretrained(saved(folder, setup), model)
    return Scene((plain_text(model, HERE), text(model, THERE, selector, way)), (model,))


SAME_WAY = (("processor", "processor"), ("loop", "loop"))
PAIRS_OF_WAYS = (*SAME_WAY, ("processor", "loop"))
SCOPE_PAIRS = [(one, other) for number, one in enumerate(SCOPES) for other in SCOPES[number + 1 :]]
#: id -> what makes a scene out of a folder for its adapters
SCENES = {
    " ".join([title, *(name_of(setting) for setting in settings if setting)]).replace(" ", "-"): partial(
        lambda make, settings, folder: make(folder, *settings), make, settings
    )
    for title, make, all_settings in (
        ("plain and s2t", plain_and_s2t, [(setup, way) for setup in SETUPS for way in WAYS]),
        ("forwards and s2t", forward_and_s2t, [(setup, way) for setup in SCOPES for way in WAYS]),
        ("one selector", one_selector, [(setup, *ways) for setup in SETUPS for ways in PAIRS_OF_WAYS]),
        ("one processor", one_processor, [(setup,) for setup in SETUPS]),
        ("two selectors", two_selectors, [(*pair, way) for pair in SCOPE_PAIRS for way in WAYS]),
        ("router and plain", with_router, [(setup, way, None) for setup in SETUPS for way in WAYS]),
        ("one router", with_router, [(setup, *ways) for setup in SETUPS for ways in SAME_WAY]),
        ("teacher is a student", teacher_is_a_student, [(setup, way) for setup in SETUPS for way in WAYS]),
        ("own adapter", own_adapter, [(setup, way) for setup in SCOPES for way in WAYS]),
    )
    for settings in all_settings
}


def scenes(every):
    """All of them, of which CI runs one in so many."""
    marks = [() if number % every == 0 else pytest.mark.slow for number in range(len(SCENES))]
    return [pytest.param(name, marks=mark) for name, mark in zip(SCENES, marks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def together(calls):
    """What calls give that start at the same time, each in a thread of its own: a value, or an exception."""
    barrier = Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(run, call) for call in calls]
    return [future.exception() or future.result() for future in futures]


def in_the_middle(calls, index):
    """The same, where the second call runs from end to end in front of the first one's `index`-th moment.

    Where it does not end there, because it waits for the first call, that goes on after a while.
    """
    others = []
    with ThreadPoolExecutor(2) as pool:

        def run_the_other():
            others.append(pool.submit(calls[1]))
            wait(others, PATIENCE)

        first = pool.submit(act_at, index, run_the_other, calls[0])
        wait([first])
        if not others:  # fewer moments than the last time
            run_the_other()
    return [future.exception() or future.result() for future in (first, others[0])]


def is_clear(error):
    """Whether an error says that the calls got in each other's way."""
    return isinstance(error, (ValueError, RuntimeError)) and "thread" in str(error)


def check(make_scene, run, moments):
    """Every text of every try is right, and no model is changed. Each try has models of its own, never used before."""
    expected = [call() for call in make_scene().calls]
    wrong, failed, changed, examples = [0, 0], 0, 0, []
    for moment in moments:
        scene = make_scene()
        before = [(logits_of(model, HERE), state_of(model)) for model in scene.models]
        for number, (got, right) in enumerate(zip(run(scene.calls, moment), expected)):
            refused = scene.may_refuse and is_clear(got)
            if got != right and not refused:
                wrong[number] += 1
                failed += isinstance(got, BaseException)
                examples.append(f"{got!r:.150}")
        for model, (logits_BTV, state) in zip(scene.models, before):
            same = torch.equal(logits_of(model, HERE), logits_BTV)
            what = changes(state, state_of(model))
            if what or not same:
                changed += 1
                examples.append(f"changed: {what[:3]}, logits {'the same' if same else 'others'}")
    assert not sum(wrong) and not changed, (
        f"of {len(moments)} pairs {wrong[0]} and {wrong[1]} texts are not what they are alone ({failed} of them are "
        f"errors), and {changed} times a model was left changed; {examples[:2]}"
    )


@pytest.fixture
def eager_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    yield
    sys.setswitchinterval(before)


def test_two_plain_texts_at_the_same_time(eager_threads, tries):
    """What the library itself promises: a fault below is none of its own."""
    check(partial(two_plain_texts, None), lambda calls, _: together(calls), range(tries(3)))


@pytest.mark.parametrize("scene", scenes(every=3))
def test_calls_at_the_same_time(scene, folder, eager_threads, tries):
    check(partial(SCENES[scene], folder), lambda calls, _: together(calls), range(tries(1)))


@pytest.mark.parametrize("scene", scenes(every=7))
def test_a_call_in_the_middle_of_another(scene, folder, tries):
    """Deterministic: the second call runs where the first one stands between two lines of this package."""
    make_scene = partial(SCENES[scene], folder)
    calls = make_scene().calls
    order = slice(None)
    moments = moments_of(calls[0])
    if not moments:  # a plain text: it runs in the middle of the other one
        order = slice(None, None, -1)
        moments = moments_of(calls[1])
    check(make_scene, lambda calls, index: in_the_middle(calls[order], index)[order], spread(moments, tries(2)))
