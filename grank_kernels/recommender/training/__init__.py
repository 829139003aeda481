"""Settings, training, evaluation and the folders of runs; only `fit`, `run` and what they import need a trainer."""
