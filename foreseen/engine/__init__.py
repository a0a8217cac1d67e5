"""The training loop and what it keeps: checkpoints, schedules, optimizers, logs."""
