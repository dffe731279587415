"""Training: stages (what is learnt), trainer (the loop), state (checkpoints, averages), run (settings to run)."""
