"""The training loop and what it leaves behind: checkpoints, metrics, plots, terminal output."""
