//! What the threads of a job share: which rows are open, which are done, and who has failed.
//!
//! A row is open, in a piece of some device, left to another process, or done; the methods here are the only ways
//! from one to the next.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{RowResult, Rows};
use crate::StageError;

/// Rows of another process are waited for this long after our own are done, or ten of our slowest pieces if that is
/// longer; then they are computed here too. Their owner may be stopped, or hang.
const PATIENCE: Duration = Duration::from_secs(60);
/// A job of which at least this many rows were computed, most of them in vain, is given up before its end.
const ENOUGH_TRIED: usize = 32;

/// The distinct rows of a job and what became of each.
pub(super) struct Share {
    /// Distinct rows to be handed out, in order.
    open: VecDeque<u32>,
    /// Distinct rows that another process computes.
    deferred: VecDeque<u32>,
    /// Distinct rows that a device computes now.
    in_work: usize,
    results: Vec<Option<RowResult>>,
    /// How many rows have each distinct key.
    weight: Vec<u32>,
    pub known: usize,
    pub computed: usize,
    /// Rows, counted with repetitions.
    pub done_rows: u64,
    failed_rows: usize,
    failed: usize,
    max_failed_rows: usize,
    /// Devices whose threads have not ended.
    pub running: usize,
    /// The first error; nothing more is handed out after it.
    pub error: Option<StageError>,
    /// The errors of devices that were lost while others went on.
    pub lost: Vec<StageError>,
    /// Device-seconds in `compute`, and the longest piece.
    busy: Duration,
    slowest: Duration,
    /// Since when there is nothing to do but to wait for another process.
    idle_since: Option<Instant>,
}

/// What a device should do next.
pub(super) enum Next {
    /// Compute these distinct rows.
    Piece(Vec<u32>),
    /// These were another process's; see whether they are done or free.
    Revisit(Vec<u32>),
    /// Others still compute rows that may come back; ask again.
    Wait,
    End,
}

impl Share {
    pub fn new(results: Vec<Option<RowResult>>, weight: Vec<u32>, open: VecDeque<u32>, max_failed_rows: usize) -> Self {
        let known = results.iter().flatten().count();
        let done_rows = results.iter().zip(&weight).filter(|(r, _)| r.is_some()).map(|(_, w)| u64::from(*w)).sum();
        Self {
            open,
            deferred: VecDeque::new(),
            in_work: 0,
            results,
            weight,
            known,
            computed: 0,
            done_rows,
            failed_rows: 0,
            failed: 0,
            max_failed_rows,
            running: 0,
            error: None,
            lost: Vec::new(),
            busy: Duration::ZERO,
            slowest: Duration::ZERO,
            idle_since: None,
        }
    }

    /// Rows that are done and did not fail: what progress is told of, since a failed one is worth nothing yet.
    pub fn rows_with_results(&self) -> u64 {
        self.done_rows - self.failed_rows as u64
    }

    /// Takes the next piece of at most `limit` rows; near the end smaller ones, so that devices end together.
    pub fn next(&mut self, limit: usize) -> Next {
        if self.error.is_some() {
            return Next::End;
        }
        if !self.open.is_empty() {
            let fair = self.open.len().div_ceil(self.running.max(1));
            let take = limit.min(fair).clamp(1, self.open.len());
            self.in_work += take;
            return Next::Piece(self.open.drain(..take).collect());
        }
        if !self.deferred.is_empty() {
            let take = limit.min(self.deferred.len());
            self.in_work += take;
            self.idle_since.get_or_insert_with(Instant::now);
            return Next::Revisit(self.deferred.drain(..take).collect());
        }
        if self.in_work > 0 { Next::Wait } else { Next::End }
    }

    /// Another process has this row.
    pub fn defer(&mut self, row: u32) {
        self.in_work -= 1;
        self.deferred.push_back(row);
    }

    /// A device could not compute these: they go to the front of the queue.
    pub fn give_back(&mut self, rows: &[u32]) {
        self.in_work -= rows.len();
        rows.iter().rev().for_each(|&row| self.open.push_front(row));
    }

    /// The row's result was found.
    pub fn found(&mut self, row: u32, bytes: Vec<u8>) {
        self.known += 1;
        self.finish(row, Ok(bytes));
    }

    /// The row was computed. A job most of whose rows fail is given up early: its program or model is broken.
    pub fn computed(&mut self, row: u32, result: RowResult) {
        self.computed += 1;
        let last = result.as_ref().err().map(ToString::to_string);
        self.finish(row, result);
        if let Some(message) = last
            && self.failed_rows > self.max_failed_rows
            && self.computed >= ENOUGH_TRIED
            && 2 * self.failed > self.computed
        {
            let tried = self.computed;
            self.fail(StageError::FailedRows {
                message: format!("most of the first {tried} rows failed, the last one with: {message}"),
                help: Some("the others were not tried; results so far are kept".into()),
            });
        }
    }

    fn finish(&mut self, row: u32, result: RowResult) {
        let index = row as usize;
        let weight = self.weight[index];
        self.in_work -= 1;
        self.idle_since = None;
        self.done_rows += u64::from(weight);
        if result.is_err() {
            self.failed_rows += weight as usize;
            self.failed += 1;
        }
        self.results[index] = Some(result);
    }

    /// Takes note of device time, and of how long the piece that it belongs to has taken so far.
    pub fn worked(&mut self, time: Duration, piece: Duration) {
        self.busy += time;
        self.slowest = self.slowest.max(piece);
    }

    /// Device-seconds that a computed row took.
    pub fn seconds_per_row(&self) -> Option<f64> {
        (self.computed > 0).then(|| self.busy.as_secs_f64() / self.computed as f64)
    }

    /// Whether rows of another process have been waited for long enough.
    pub fn is_impatient(&self) -> bool {
        self.idle_since.is_some_and(|since| since.elapsed() > PATIENCE.max(self.slowest * 10))
    }

    pub fn fail(&mut self, error: StageError) {
        self.error.get_or_insert(error);
    }

    /// A device's thread ends; whatever it had in work was given back, unless the whole job fails.
    pub fn end_device(&mut self, outcome: Result<(), StageError>) {
        self.running -= 1;
        match outcome {
            Ok(()) => {}
            Err(error @ StageError::DeviceLost { .. }) if self.running > 0 => self.lost.push(error),
            Err(error) => self.fail(error),
        }
    }

    /// So many threads could not be started. The others go on, if there are any.
    pub fn not_started(&mut self, threads: usize, others: bool, error: StageError) {
        self.running -= threads;
        if others { self.lost.push(error) } else { self.fail(error) }
    }

    /// Every row's result, once all are done.
    pub fn into_rows(self, of_row: Vec<u32>) -> Result<Rows, StageError> {
        let results: Option<Vec<RowResult>> = self.results.into_iter().collect();
        match results {
            Some(results) => Ok(Rows { results, of_row, known: self.known, computed: self.computed }),
            None => Err(StageError::bug("the devices ended before all rows were done")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_cannot_be_started_are_an_error_only_where_none_can() {
        let no_thread = || StageError::io("start a thread for", "request 2", std::io::ErrorKind::WouldBlock.into());
        let shared = |others| {
            let mut share = Share::new(vec![None], vec![1], VecDeque::from([0]), 0);
            share.running = 5;
            share.not_started(if others { 3 } else { 5 }, others, no_thread());
            share
        };
        let mut share = shared(true);
        assert_eq!((share.running, share.lost.len(), share.error.is_none()), (2, 1, true));
        assert!(matches!(share.next(1), Next::Piece(_)));
        let mut share = shared(false);
        assert_eq!((share.running, share.lost.len(), share.error.is_some()), (0, 0, true));
        assert!(matches!(share.next(1), Next::End));
    }
}
