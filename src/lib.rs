//! The orchestrator: pipeline files, keys, plans, scheduling, workers and reports. Knows no machine learning.
