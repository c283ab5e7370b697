//! What a row stage gives: its rows and their keys, and the function that computes some of them on one device.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{Device, StageError, StopFlag, machine};

use super::RowKey;

/// Rows of one reason that an error names, where there are many.
const NAMED: usize = 2;

/// The result of a row, or why there is none.
pub type RowResult = Result<Vec<u8>, RowFailure>;

/// A row could not be computed, and the others can: the model's answer is of no use, the program refused the item.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", .row.as_ref().map(|row| format!("{row}: ")).unwrap_or_default())]
pub struct RowFailure {
    pub message: String,
    /// The row's name, where it has one that a user knows.
    pub row: Option<String>,
}

impl RowFailure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), row: None }
    }

    pub fn of(mut self, row: impl Into<String>) -> Self {
        self.row = Some(row.into());
        self
    }
}

/// The rows of one stage, by their keys.
#[derive(Debug, Clone)]
pub struct RowJob {
    /// Where results are kept: the kind of result, such as `embedding`; letters, digits, `.`, `_` and `-`.
    pub namespace: String,
    /// What a row is, in progress: `item`, `user`.
    pub unit: String,
    /// A key for each row. Equal keys are computed once.
    pub keys: Vec<RowKey>,
    /// What a user knows each row by; without it, rows are counted from 1.
    pub names: Option<Vec<String>>,
    /// Rows that a device gets at a time, at most.
    pub batch: usize,
    /// The stage fails when more rows than this do.
    pub max_failed_rows: usize,
    /// How much work each row is, in any unit (tokens of the prompt). Rows are then handed out from the dearest on:
    /// pieces are of like rows, memory runs out early if at all, and the last pieces are short.
    pub costs: Option<Vec<u64>>,
    /// Pieces under way at once where the work is done elsewhere, by a server: each on a thread of its own, whatever
    /// the devices, and none waits for another.
    pub requests: Option<usize>,
}

impl RowJob {
    /// A job with pieces of at most 32 rows, of which none may fail.
    pub fn new(namespace: impl Into<String>, unit: impl Into<String>, keys: Vec<RowKey>) -> Self {
        Self {
            namespace: namespace.into(),
            unit: unit.into(),
            keys,
            names: None,
            batch: 32,
            max_failed_rows: 0,
            costs: None,
            requests: None,
        }
    }

    pub fn batch(mut self, rows: usize) -> Self {
        self.batch = rows.max(1);
        self
    }

    pub fn max_failed_rows(mut self, rows: usize) -> Self {
        self.max_failed_rows = rows;
        self
    }

    pub fn requests(mut self, at_once: usize) -> Self {
        self.requests = Some(at_once.max(1));
        self
    }

    /// One name for each key.
    pub fn names(mut self, names: Vec<String>) -> Self {
        self.names = Some(names);
        self
    }

    /// Rows that failed as a message names them: ``items `a`, `b` (and 3 more)``.
    pub(super) fn named(&self, failed: &[(usize, &RowFailure)]) -> String {
        let name = |(row, failure): &(usize, &RowFailure)| match (&failure.row, &self.names) {
            (Some(name), _) => name.clone(),
            (None, Some(names)) => format!("`{}`", names[*row]),
            (None, None) => (row + 1).to_string(),
        };
        // `(and 1 more)` takes the place of a name.
        let shown = if failed.len() == NAMED + 1 { NAMED + 1 } else { NAMED.min(failed.len()) };
        let names: Vec<String> = failed[..shown].iter().map(name).collect();
        let plural = if failed.len() == 1 { "" } else { "s" };
        let more = if failed.len() > shown { format!(" (and {} more)", failed.len() - shown) } else { String::new() };
        format!("{}{plural} {}{more}", self.unit, names.join(", "))
    }

    /// One cost for each key.
    pub fn costs(mut self, costs: Vec<u64>) -> Self {
        self.costs = Some(costs);
        self
    }
}

/// One of the devices that a job is spread over: a leased GPU; or, without any, the CPU; or one of several made-up
/// devices, which share the leased cores.
#[derive(Debug, Clone)]
pub struct RowDevice {
    /// Counted from 0.
    pub number: usize,
    pub device: Device,
    /// How many devices the job is spread over; they share the machine's memory.
    pub of: usize,
    /// Cores that this device's function may use.
    pub threads: usize,
    /// Set when the attempt should end. Between pieces the framework looks at it; a function that takes long for one
    /// piece should too, and return [`StageError::Stopped`].
    pub stop: StopFlag,
    pub notes: Notes,
}

/// What a device's function has to say while it works; the user reads it as the stage's warnings.
#[derive(Debug, Clone, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    pub fn warn(&self, message: impl Into<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(message.into());
    }

    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl RowDevice {
    /// Bytes of the machine's free memory that fall to this device, where that can be found out.
    pub fn free_memory(&self) -> Option<u64> {
        Some(machine::available_memory()? / self.of.max(1) as u64)
    }

    /// A rayon pool of this device's cores.
    ///
    /// # Errors
    /// The system refuses to start threads.
    pub fn pool(&self) -> Result<rayon::ThreadPool, StageError> {
        rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .build()
            .map_err(|e| StageError::io("start threads for", "this stage", std::io::Error::other(e)))
    }
}

/// Computes rows on one device. Made on the device's own thread and never moved, so it need not be `Send`.
pub trait RowFunction {
    /// The results of `rows` (indices into the job's keys), each with its row: of all of them, or of those that are
    /// done already, at least one. They are kept, and the others are asked for again.
    ///
    /// # Errors
    /// What concerns all of them: [`StageError::OutOfMemory`] is tried again with half the rows,
    /// [`StageError::DeviceLost`] on another device, anything else ends the stage. What concerns one row alone is
    /// that row's [`RowFailure`].
    fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError>;

    /// Gives back memory that is kept for speed (a cache of keys and values), before a smaller piece is tried.
    fn free_memory(&mut self) {}

    /// What ends the stage although the last [`RowFunction::compute`] had results (a server that went down): asked for
    /// once they are kept.
    fn end(&mut self) -> Option<StageError> {
        None
    }
}
