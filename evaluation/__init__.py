"""Tasks, metrics, measuring, tables, tuning, sweeps, calibration, analysis, pictures."""
