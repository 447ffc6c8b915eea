"""From text to batches: corpora (where the text is), tokenizer, tokens (memory-mapped ids), loader, datamodule."""
