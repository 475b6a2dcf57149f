"""What a trained model is worth: perplexity and the report of a run."""
