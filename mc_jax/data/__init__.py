"""Text to batches: tokenizers, token stores, rows for training, windows for evaluation.

`dataset.open_data` gives a tokenizer and token stores; `pipeline.training_batches` and
`windows.evaluation_windows` turn a store into batches; `prepare.prepare` writes a store from text files.
"""
