"""Trains a tiny selector, saves it and writes its figures; tests/test_distributed.py starts it in several ways.

Arguments: SCOPE BATCH_SIZE FOLDER; the model is in FOLDER/model.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from test_s2t_trainer import make_trainer
from tiny_labels import make_uneven_labels


def shard_on_cpu():
    """Accelerate shards a model on accelerators alone; the code is the same, so it is told that this is one."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    backend = mock.Mock(return_value=("gloo", DistributedType.MULTI_GPU))
    mock.patch.object(PartialState, "_prepare_backend", backend).start()


def main(scope, batch_size, folder):
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    folder = Path(folder)
    trainer = make_trainer(
        folder,
        model=str(folder / "model"),
        labels=make_uneven_labels(),
        # the last batch is filled up with duplicates, and processes hold rows with different numbers of points
        eval_dataset=make_uneven_labels(23, seed=1),
        adapter_scope=scope,
        per_device_train_batch_size=int(batch_size),
        per_device_eval_batch_size=int(batch_size),
        num_train_epochs=2,
        eval_strategy="steps",  # in the midst of training: it leaves some wrappers in another state
        eval_steps=2,
        logging_steps=1,
    )
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    figures = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        written = {
            "kind": trainer.accelerator.distributed_type.value,
            "world_size": trainer.args.world_size,
            "loss": [log["loss"] for log in steps],
            "grad_norm": [log["grad_norm"] for log in steps],
            "eval": {name: value for name, value in figures.items() if name.startswith("eval_")},
        }
        (folder / "figures.json").write_text(json.dumps(written))
    trainer.accelerator.wait_for_everyone()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then hang, or abort, when an interpreter takes its objects apart


if __name__ == "__main__":
    main(*sys.argv[1:])
