"""Studies: one file per paper in `<family>/<slug>.py`, run and judged by `python -m experiments.run`.

`study.py` says what a study is, `cache.py` trains each configuration once, `verdict.py` judges claims, `record.py` writes
the ledger, `report.py` and `plots.py` show it, `catalog.py` reads the list of methods.
"""
