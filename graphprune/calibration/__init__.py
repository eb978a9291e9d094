"""Calibration data: from a recipe's section to samples that every pass with data uses.

A source is one of

* ``builtin`` (see `graphprune.calibration.text.builtin`), ``help`` (CPython's reference text), a
  text file, or a JSONL or JSON file of texts or token ids;
* a directory that ``datasets.save_to_disk`` wrote, with a column of text, token ids, images or
  recordings;
* token ids in a ``.npy``, ``.npz`` or ``.safetensors`` file: ``[windows, length]`` or ``[tokens]``;
* a ``.npz`` or ``.safetensors`` file with one array ``[samples, ...]`` for each input;
* an image or a directory of images; a ``.wav`` file or a directory of them;
* ``self``, for windows that the model writes itself;
* ``module:function`` or ``file.py:function``, which returns what `graphprune.streaming.batches`
  takes.

A mapping is a mixture of sources of tokens. `calibrate` reads it, `measured` says which texts the
model is measured on and reads them, and `dense` stops a run whose dense model makes no sense of the
calibration data.
"""
