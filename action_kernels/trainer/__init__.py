"""The reference trainer: ACTION++ (pre-training and fine-tuning), its baselines and their evaluation; the extra ``[train]``.

`cli.py` is the way in (``action-kernels train``, ``action-kernels evaluate``); `run.run_training` and
`run.evaluate_run` are the same from Python, and `stages` show the method. Nothing here is imported by ``import action_kernels``.
"""
