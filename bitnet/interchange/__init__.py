"""The model in other programs' files, and theirs in ours: Hugging Face folders and GGUF.

``names``       one table of tensor names per format, used in both directions
``parts``       a model as exporters see it: matrices with levels and scales, norms, embedding
``hf_export``   ``hf_import``     config.json, model.safetensors, tokenizer files
``gguf_export`` ``gguf_import``   one file; ``gguf_blocks`` has the layouts that the gguf package does not write
``check``       every export is read by the other program and compared before it gets its name
``card``        the README.md of an exported folder
"""
