"""The paper's tables and figures, one command away: ``action-kernels reproduce``.

`tables` says what a table is made of (rows, each a method) and `paper` what the paper reports; `scale` makes a run
shorter; `data` finds the images; `plan` turns rows and seeds into runs, each once, in folders named by the hash of
their configuration; `cost` says beforehand how long they take; `work` carries them out, `measure` evaluates them;
`collect` reads what they left, `render`, `plots` and `pictures` show it. `command` does all of it in this order.
"""
