//! What a worker tells the engine while it runs: one JSON object a line, over a pipe.
//!
//! The engine adds time, run, stage and attempt, and passes the events on to reporters and the journal.

use serde::{Deserialize, Serialize};

use crate::Failure;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WorkerEvent {
    /// `done` of `total` units (`item`, `user`, `step`, `byte`) are finished.
    Progress { done: u64, total: u64, unit: String },
    /// A number worth a curve or a table, for example `loss` or `valid.ndcg@10`.
    Metric { name: String, value: f64, step: Option<u64> },
    /// A line for the user: what was dropped, what looks odd.
    Log { level: LogLevel, message: String },
    /// The last event of a failed attempt.
    Failed { failure: Failure, message: String, help: Option<String> },
    /// The last event of an attempt that succeeded.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogLevel {
    Info,
    Warn,
}
