"""Settings, fitting, evaluation, experiments."""
