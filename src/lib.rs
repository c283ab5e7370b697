//! The orchestrator: pipeline files, keys, plans, scheduling, workers and reports. Knows no machine learning.

pub mod allocator;
pub mod cli;
pub mod error;
pub mod events;
pub mod executor;
pub mod exit_codes;
pub mod journal;
