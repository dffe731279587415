"""Training: stages (what is learnt), trainer (the loop), state (checkpoints, averaged weights), run (from settings to a run)."""
