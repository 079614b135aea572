"""The commands of eval.py: tasks, metrics, measurements, tables, tuning, sweeps, calibration, pictures."""
