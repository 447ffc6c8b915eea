"""Training with Lightning. Everything that imports Lightning lives here, in ``data.datamodule`` and in train.py."""
