"""Labeling killed by SIGKILL, at chosen file operations and at random moments, and resumed: the same rows.

Runs are children forked from this process, so that imports and models cost nothing; it has one thread, so it may fork.
"""

import os
import random
import shutil
import signal
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import EOS, PAD, RESERVED, tiny_model

from transformers_s2t.labeling.label_problems import label_problems
from transformers_s2t.labels.folder import CARD_NAME, read_header, shard_files
from transformers_s2t.labels.schema import HEADER_NAME, TrajectoryHeader


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
FILE_OPERATIONS = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove"}


def make_header(**changes):
    settings = {"num_candidates": 4, "target_rate": 0.2, "max_new_tokens": 6, "threshold_sample": 5}
    settings |= {"eos_token_ids": (EOS,), "excluded_ids": RESERVED, "vocab_hash": "0123456789abcdef"}
    return TrajectoryHeader(model="student", teacher_model="teacher", **settings | changes)


@pytest.fixture(scope="module")
def job():
    """What `label_problems` is called with: tiny models and 24 prompts of different lengths."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 12, (24,), generator=generator).tolist()
    prompts = {f"p{i}": torch.randint(3, 80, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}
    return tiny_model(), tiny_model(seed=1), prompts


def label(job, folder, num_problems=24, shard_size=3, **changes):
    model, teacher, prompts = job
    prompts = dict(list(prompts.items())[:num_problems])
    header = make_header(**changes)
    return label_problems(model, teacher, prompts, folder, header, PAD, 2, shard_size, show_progress=False)


def fork(work, *args):
    """Starts `work(*args)` in a child and returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work(*args)
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return child


def wait(child):
    """True where the child was killed, False where it ended well."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "a run did not go on where another one was killed"
    return False


def die_at_operation(folder, number):
    """Kills this process just before its `number`-th operation on a file in `folder`; only ever called in a child."""
    seen, here = [0], str(folder)

    def hook(event, args):
        if event in FILE_OPERATIONS and any(str(arg).startswith(here) for arg in args if not isinstance(arg, int)):
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

    sys.addaudithook(hook)


def table_of(folder):
    return pa.concat_tables([pq.read_table(file) for file in shard_files(folder)])


def assert_as_if_never_killed(folder, whole):
    """The same files, and in them the same rows in the same order, to the last bit."""
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in whole.iterdir())
    table, expected = table_of(folder), table_of(whole)
    assert table.column("problem_id").to_pylist() == expected.column("problem_id").to_pylist()
    assert table.equals(expected, check_metadata=True)
    for name in (HEADER_NAME, CARD_NAME):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert read_header(folder).complete


@pytest.mark.parametrize("num_kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_byte(job, tmp_path, num_kills):
    """Labeling is killed and resumed until the folder is complete; then a new one begins, until all have struck."""
    began = time.perf_counter()
    label(job, tmp_path / "whole")
    seconds = time.perf_counter() - began
    chance, kills, folder = random.Random(7), 0, tmp_path / "0"
    shards_found = set()
    while kills < num_kills:
        child = fork(label, job, folder)
        time.sleep(chance.uniform(0.0, 0.4 + 0.1 * kills) * seconds)  # more and more: the machine may have slowed down
        os.kill(child, signal.SIGKILL)  # of a child that has ended, this is nothing
        if wait(child):
            kills += 1
            shards_found.add(len(shard_files(folder)))
        elif not folder.is_dir() or read_header(folder).complete:
            assert_as_if_never_killed(folder, tmp_path / "whole")
            folder = tmp_path / str(int(folder.name) + 1)
    assert not wait(fork(label, job, folder))
    assert_as_if_never_killed(folder, tmp_path / "whole")
    assert len(shards_found) > 1  # struck early and late


def test_a_kill_at_any_file_operation_changes_no_byte(job, tmp_path):
    """Before every single operation: the header's, the card's, the shards' temporary files and renames, the last."""
    settings = {"num_problems": 4, "shard_size": 2, "threshold_sample": 3}
    label(job, tmp_path / "whole", **settings)

    def run(folder, number):
        die_at_operation(folder, number)
        label(job, folder, **settings)

    number, killed = 0, True
    while killed:
        folder = tmp_path / str(number)
        killed = wait(fork(run, folder, number))
        label(job, folder, **settings)
        assert_as_if_never_killed(folder, tmp_path / "whole")
        number += 1
    assert number > 10


def test_a_kill_while_labels_are_replaced_leaves_what_can_be_replaced(job, tmp_path):
    """Overwriting deletes before it writes: whatever is left must still be known for labels, not for other files."""
    model, teacher, prompts = job
    prompts = dict(list(prompts.items())[:4])
    before, after = make_header(max_new_tokens=3), make_header()
    settings = {"pad_token_id": PAD, "batch_size": 2, "shard_size": 2, "show_progress": False}
    label_problems(model, teacher, prompts, tmp_path / "whole", after, **settings)
    label_problems(model, teacher, prompts, tmp_path / "before", before, **settings)

    def run(folder, number):
        die_at_operation(folder, number)
        label_problems(model, teacher, prompts, folder, after, overwrite=True, **settings)

    number, killed = 0, True
    while killed:
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", folder)
        killed = wait(fork(run, folder, number))
        label_problems(model, teacher, prompts, folder, after, overwrite=True, **settings)
        assert_as_if_never_killed(folder, tmp_path / "whole")
        number += 1
    assert number > 10


def test_other_files_are_still_refused(job, tmp_path):
    """Only names that a killed run leaves behind pass for an empty folder."""
    (tmp_path / ".notes").write_text("mine")
    (tmp_path / f".{HEADER_NAME}.x").write_text("half")
    with pytest.raises(ValueError, match="`output_dir` must be a new or empty folder"):
        label(job, tmp_path)
    (tmp_path / ".notes").unlink()
    assert label(job, tmp_path).complete
    assert not list(tmp_path.glob(".*"))
