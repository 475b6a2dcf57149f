"""The adapter for EleutherAI's lm-evaluation-harness: its tasks, asked of a run's model (extra `eval`)."""
