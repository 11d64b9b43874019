"""Trains a tiny selector and writes its loss curve; tests/test_distributed.py starts it, alone or by accelerate.

Arguments: SCOPE BATCH_SIZE FILE.json
"""

import json
import sys
from pathlib import Path

from test_s2t_trainer import make_trainer
from tiny_labels import make_uneven_labels


def main(scope, batch_size, file):
    file = Path(file)
    trainer = make_trainer(
        file.parent / f"batch-{batch_size}",
        labels=make_uneven_labels(),
        adapter_scope=scope,
        per_device_train_batch_size=int(batch_size),
        per_device_eval_batch_size=int(batch_size),
        num_train_epochs=2,
        logging_steps=1,
    )
    trainer.train()
    curve = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        eval_figures = {name: value for name, value in figures.items() if name.startswith("eval_")}
        file.write_text(json.dumps({"loss": curve, "world_size": trainer.args.world_size, "eval": eval_figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
