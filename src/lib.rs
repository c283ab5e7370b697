//! The orchestrator: pipeline files, keys, plans, scheduling, workers and reports. Knows no machine learning.

pub mod allocator;
pub mod cli;
pub mod device;
pub mod differences;
pub mod dispatch;
pub mod engine;
pub mod error;
pub mod events;
pub mod executor;
pub mod exit_codes;
pub mod graph;
pub mod journal;
pub mod key;
pub mod metrics;
pub mod pipeline;
pub mod progress;
pub mod schedule;
pub mod simulate;
