"""The reference trainer: ACTION++ fine-tuning and its evaluation, behind the extra ``[train]``.

`cli.py` is the way in (``action-kernels train``, ``action-kernels evaluate``); `training.run_training` and
`evaluation.evaluate_run` are the same from Python. Nothing here is imported by ``import action_kernels``.
"""
