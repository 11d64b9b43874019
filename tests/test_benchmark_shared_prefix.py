"""What benchmarks/shared_prefix.py compares and writes, on its tiny shape. Nothing here depends on times."""

import json

import pytest
import shared_prefix as bench
import torch


TINY = ["--shape", "tiny", "--num_layers", "2", "--vocab_size", "300", "--batch_size", "8", "--own", "6"]
TINY += ["--new_tokens", "8", "--turns", "1", "--shared", "9", "12"]


def test_every_part_is_timed_with_sharing_and_without(tmp_path, capsys, monkeypatch):
    tokens = []

    def timed(function):
        handle = function.__self__.model.model.layers[0].register_forward_pre_hook(
            lambda module, args: tokens.append(args[0][..., 0].numel())
        )
        tokens.append(0)
        try:
            return 1.0, function()
        finally:
            handle.remove()
            runs.append((function.__name__, sum(tokens)))
            tokens.clear()

    runs = []
    monkeypatch.setattr(bench, "timed", timed)
    bench.main([*TINY, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["part"], row["shared"]) for row in rows] == [(part, n) for n in (9, 12) for part in bench.PARTS]
    for (name, few), (other, many) in zip(runs[::2], runs[1::2], strict=True):
        assert name == other and few < many
    assert "| rollout | 9 | 1.00 [1.00, 1.00] |" in capsys.readouterr().out


def test_other_numbers_end_the_run():
    bench.compare("rollout", [[1]], [[1]])
    with pytest.raises(RuntimeError, match="Texts differ"):
        bench.compare("rollout", [[1]], [[2]])
    with pytest.raises(RuntimeError, match="numbers differ by 1"):
        bench.compare("scoring", torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize("flags", [["--shared", "4"], ["--turns", "0"], ["--batch_size", "2"]])
def test_bad_flags_are_told_in_one_line(capsys, flags):
    with pytest.raises(SystemExit) as error:
        bench.main([*TINY, *flags])
    assert error.value.code == 2 and "must be at least" in capsys.readouterr().err
